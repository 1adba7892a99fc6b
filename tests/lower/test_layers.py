"""Layers that ask PyTorch for values, under `lower=True` and on the device, against PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch2jax import Torch2JaxError, device, from_module, t2j, torch2jax

device.enable()


def close(found: Any, expected: torch.Tensor) -> None:
    found = found.detach().jax() if isinstance(found, device.Tensor) else found
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=2e-5, atol=2e-6)


def by_lower(fn: Callable[..., Any], *args: torch.Tensor) -> Any:
    return torch2jax(fn, lower=True)(*map(t2j, args))


def by_the_device(fn: Callable[..., Any], *args: torch.Tensor) -> Any:
    """The second call of the compiled function; the first one runs step by step."""
    compiled = device.jit(fn)
    compiled(*[x.to("jax") for x in args])
    return compiled(*[x.to("jax") for x in args])


# --- transformers with masks that are traced ------------------------------------------------------

torch.manual_seed(0)
DIM = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "dropout": 0.0, "batch_first": True}
ENCODER = nn.TransformerEncoder(nn.TransformerEncoderLayer(**DIM), 2, enable_nested_tensor=False)
DECODER = nn.TransformerDecoder(nn.TransformerDecoderLayer(**DIM), 2)
BOTH = nn.Transformer(**DIM, num_encoder_layers=1, num_decoder_layers=1)
X = torch.randn(2, 4, 8)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(4)
PAD = torch.tensor([[False, False, False, True], [False] * 4])

MASKED: dict[str, tuple[nn.Module, Callable[..., Any]]] = {
    "encoder": (ENCODER, lambda m, x, mask, pad: m(x, mask=mask)),
    "encoder, padded": (
        ENCODER,
        lambda m, x, mask, pad: m(x, mask=mask != 0, src_key_padding_mask=pad),
    ),
    "decoder": (DECODER, lambda m, x, mask, pad: m(x, x, tgt_mask=mask)),
    "decoder, padded": (
        DECODER,
        lambda m, x, mask, pad: m(
            x, x, tgt_mask=mask != 0, tgt_key_padding_mask=pad, memory_key_padding_mask=pad
        ),
    ),
    "transformer": (BOTH, lambda m, x, mask, pad: m(x, x, src_mask=mask, tgt_mask=mask)),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", MASKED)
def test_traced_masks(name: str, train: bool) -> None:
    module, call = copy.deepcopy(MASKED[name])
    module.train(train)
    expected = call(module, X, CAUSAL, PAD)
    close(by_lower(lambda *args: call(module, *args), X, CAUSAL, PAD), expected)
    module.to("jax")
    close(by_the_device(lambda *args: call(module, *args), X, CAUSAL, PAD), expected)


def test_gradients_beside_a_traced_mask() -> None:
    module, call = MASKED["transformer"]
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad((call(module, x, CAUSAL, PAD) ** 2).sum(), x)[0]
    lowered = torch2jax(lambda *args: (call(module, *args) ** 2).sum(), lower=True)
    np.testing.assert_allclose(
        jax.jit(jax.grad(lowered))(*map(t2j, (X, CAUSAL, PAD))), expected, rtol=2e-4, atol=2e-5
    )


def test_nested_tensors_say_what_to_do() -> None:
    rows = [torch.ones(2, device="jax"), torch.ones(3, device="jax")]
    for layout in (torch.strided, torch.jagged):
        with pytest.raises(Torch2JaxError, match="pad_sequence"):
            torch.nested.nested_tensor(rows, layout=layout)
    with pytest.raises(Torch2JaxError, match="pad_sequence"):
        torch2jax(lambda x: torch.nested.as_nested_tensor([x[:2], x[:3]]), lower=True)(jnp.ones(4))


# --- connectionist temporal classification --------------------------------------------------------

SCORES = torch.randn(6, 3, 4).log_softmax(-1)
TARGETS = torch.tensor([[1, 2, 2], [3, 1, 0], [2, 0, 0]])
STEPS, SIZES = (6, 4, 1), (3, 2, 1)
LENGTHS: dict[str, tuple[Any, Any]] = {
    "tuples": (STEPS, SIZES),
    "tensors": (torch.tensor(STEPS), torch.tensor(SIZES)),
}


@pytest.mark.parametrize("options", [{}, {"blank": 3, "zero_infinity": True}, {"reduction": "sum"}])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_ctc_loss_with_known_lengths(lengths: str, options: Any) -> None:
    steps, sizes = LENGTHS[lengths]
    targets = TARGETS - (TARGETS == 3).long() if options.get("blank") else TARGETS
    joined = torch.cat([t[:n] for t, n in zip(targets, SIZES, strict=True)])
    for labels in (targets, joined):
        scores = SCORES.clone().requires_grad_()
        loss = F.ctc_loss(scores, labels, steps, sizes, **options)
        (expected,) = torch.autograd.grad(loss, scores)
        lowered = torch2jax(lambda s, t: F.ctc_loss(s, t, steps, sizes, **options), lower=True)
        value, g = jax.value_and_grad(lowered)(t2j(SCORES), jnp.asarray(labels.numpy()))
        close(value, loss)
        close(g, expected)


def test_ctc_loss_with_traced_lengths() -> None:
    arrays = [jnp.asarray(x) for x in (TARGETS.numpy(), STEPS, SIZES)]
    found = torch2jax(F.ctc_loss, lower=True)(t2j(SCORES), *arrays)
    close(found, F.ctc_loss(SCORES, TARGETS, STEPS, SIZES))


@pytest.mark.parametrize("zero_infinity", [False, True])
def test_ctc_loss_with_an_impossible_target(zero_infinity: bool) -> None:
    def fn(scores: torch.Tensor) -> torch.Tensor:
        return F.ctc_loss(
            scores, TARGETS, (2, 2, 2), SIZES, reduction="none", zero_infinity=zero_infinity
        )

    scores = SCORES.clone().requires_grad_()
    (expected,) = torch.autograd.grad(fn(scores).sum(), scores)
    lowered = torch2jax(fn, lower=True)
    close(lowered(t2j(SCORES)), fn(SCORES))
    close(jax.grad(lambda s: lowered(s).sum())(t2j(SCORES)), expected)


# --- embeddings -----------------------------------------------------------------------------------

ROWS = torch.tensor([[3.0, 4.0], [0.3, -0.4], [6.0, 1.0], [2.0, 2.0]])
PLACES = torch.tensor([0, 2, 0, 1])


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("run", [by_lower, by_the_device])
@pytest.mark.parametrize("bag", [False, True])
def test_max_norm(bag: bool, run: Any, norm_type: float) -> None:
    def fn(weight: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        weight = weight.clone()
        options: Any = {"max_norm": 1.5, "norm_type": norm_type}
        if bag:
            out = F.embedding_bag(places[None], weight, mode="sum", **options)
        else:
            out = F.embedding(places, weight, **options)
        return torch.cat([out, weight])

    close(run(fn, ROWS, PLACES), fn(ROWS, PLACES))


def test_max_norm_of_a_module() -> None:
    def made() -> nn.Embedding:
        return nn.Embedding(4, 2, max_norm=1.5, _weight=ROWS.clone())

    theirs, ours = made(), made().to("jax")
    expected = theirs(PLACES)
    close(ours(PLACES.to("jax")), expected)
    close(ours.weight, theirs.weight)
    apply, variables = from_module(made(), lower=True)
    close(apply(variables, jnp.asarray(PLACES.numpy())), expected)


@pytest.mark.parametrize("run", ["lower", "device", "device.jit"])
@pytest.mark.parametrize("bag", [None, "sum", "mean"])
def test_gradients_scaled_by_frequency(bag: Any, run: str) -> None:
    def rows(weight: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        out = F.embedding(places, weight, padding_idx=1, scale_grad_by_freq=True)
        return (
            (out.sum(0) if bag == "sum" else out.mean(0) if bag == "mean" else out).square().sum()
        )

    def fn(weight: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        if bag is None:
            return rows(weight, places)
        out = F.embedding_bag(places[None], weight, mode=bag, scale_grad_by_freq=True)
        return out.square().sum()

    # PyTorch's bag on CPU takes the frequency of another index, so rows say what is right.
    places = PLACES if bag is None else torch.tensor([0, 2, 0, 3])
    weight = ROWS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(rows(weight, places), weight)
    if run == "lower":
        close(jax.grad(torch2jax(fn, lower=True))(t2j(ROWS), jnp.asarray(places.numpy())), expected)
        return
    call = fn if run == "device" else device.jit(fn)
    for _ in range(2):
        weight = ROWS.to("jax").requires_grad_()
        call(weight, places.to("jax")).backward()
        close(weight.grad, expected)


@pytest.mark.parametrize(
    ("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False), ("max", False)]
)
@pytest.mark.parametrize("padding", [None, 2, 3])
def test_bags(mode: str, padding: int | None, weighted: bool) -> None:
    """Some are empty, some hold padding alone: by `lower=True`, and eager with PyTorch's autograd."""
    places, starts = torch.tensor([0, 2, 0, 1, 2, 2, 3, 3]), torch.tensor([0, 2, 2, 5, 6])

    def fn(rows: torch.Tensor, factors: torch.Tensor, places: torch.Tensor, starts: torch.Tensor):
        given = factors if weighted else None
        out = F.embedding_bag(
            places, rows, starts, mode=mode, per_sample_weights=given, padding_idx=padding
        )
        return (out + 1).square().sum() + factors.sum()

    factors = torch.linspace(0.5, 2, 8)
    leaves = [ROWS.clone().requires_grad_(), factors.clone().requires_grad_()]
    expected = torch.autograd.grad(fn(*leaves, places, starts), leaves)
    moved = [x.to("jax").requires_grad_() for x in (ROWS, factors)]
    fn(*moved, places.to("jax"), starts.to("jax")).backward()
    arrays = [jnp.asarray(x.numpy()) for x in (places, starts)]
    lowered = jax.grad(torch2jax(fn, lower=True), (0, 1))(t2j(ROWS), t2j(factors), *arrays)
    for right, eager, traced in zip(expected, moved, lowered, strict=True):
        close(eager.grad, right)
        close(traced, right)


# --- batch norm whose statistics are plain means --------------------------------------------------

BATCHES = [torch.randn(5, 3) for _ in range(3)]


def test_batch_norm_without_momentum() -> None:
    def made() -> nn.BatchNorm1d:
        return nn.BatchNorm1d(3, momentum=None)

    theirs, ours = made(), made().to("jax")
    apply, variables = from_module(made(), lower=True)
    compiled = device.jit(ours)
    for x in BATCHES:
        expected = theirs(x)
        out, buffers = apply(variables, t2j(x), train=True)
        variables = {**variables, "buffers": buffers}
        close(out, expected)
        close(compiled(x.to("jax")), expected)
        for name, b in theirs.named_buffers():
            np.testing.assert_allclose(variables["buffers"][name], b.numpy(), rtol=1e-5)
            np.testing.assert_allclose(ours.get_buffer(name).cpu(), b, rtol=1e-5)


# --- what is compiled, and equality ---------------------------------------------------------------


def test_compiled_modules_and_functions() -> None:
    plain = nn.Linear(3, 2)
    module: Any = torch.compile(plain)
    x = BATCHES[0]
    close(torch2jax(module, lower=True)(t2j(x)), plain(x))
    apply, variables = from_module(module, lower=True)
    close(apply(variables, t2j(x)), plain(x))
    function = torch.compile(lambda x: torch.sin(x) * 2)
    close(torch2jax(lambda x: function(x) + 1, lower=True)(t2j(x)), torch.sin(x) * 2 + 1)


def test_equal_where_the_answer_is_known() -> None:
    def fn(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        known = [
            torch.equal(x, x),
            torch.equal(x, x.detach()),
            torch.equal(x.clone(), x),
            torch.equal(x[:, 1], x[:, 1]),
            torch.equal(n, n.view(6)),
            torch.equal(x[:0], x[:0] + 1),
            not torch.equal(x, x[:2]),
            torch.equal(torch.arange(3), torch.tensor([0, 1, 2])),
        ]
        assert known == [True] * len(known), known
        return x * 2

    x, n = torch.ones(3, 2), torch.arange(6)
    close(by_lower(fn, x, n), fn(x, n))
    with pytest.raises(Torch2JaxError, match=r"torch\.equal asks for the values"):
        torch2jax(lambda x: x if torch.equal(x, x + 1) else -x, lower=True)(jnp.ones(3))
    with pytest.raises(Torch2JaxError, match=r"torch\.equal asks for the values"):
        torch2jax(lambda x: x if torch.equal(x[:2], x[1:]) else -x, lower=True)(jnp.ones(3))
