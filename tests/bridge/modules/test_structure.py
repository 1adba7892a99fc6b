"""Modules as pure functions of their variables: values and gradients are torch's own.

Nearly everything is checked by `agrees`: outputs and all gradients, in parameters and inputs, of
what `from_module` made against those of a copy of the module that torch runs itself.
"""

from __future__ import annotations

import copy
import threading
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from torch2jax import (
    SignatureError,
    Torch2JaxWarning,
    TorchCallError,
    clear_tape,
    from_module,
    tape_info,
    to_state_dict,
)

ERRORS = (jax.errors.JaxRuntimeError, RuntimeError, ValueError)


@pytest.fixture(autouse=True)
def fresh_tape():
    clear_tape()
    torch.manual_seed(0)
    yield
    clear_tape()


def array(t: torch.Tensor) -> np.ndarray:
    return t.detach().to(torch.float32).numpy() if t.is_floating_point() else t.detach().numpy()


def close(actual: Any, expected: Any, tolerance: float = 2e-5, where: str = "") -> None:
    np.testing.assert_allclose(
        np.asarray(actual, np.float64),
        np.asarray(expected, np.float64),
        tolerance,
        tolerance,
        err_msg=where,
    )


def leaves(out: Any) -> list[Any]:
    """Inexact leaves of an output, torch's or JAX's, dicts by their keys."""
    if isinstance(out, dict):
        return [y for k in sorted(out) for y in leaves(out[k])]
    if isinstance(out, list | tuple):
        return [y for o in out for y in leaves(o)]
    if out is None:
        return []
    if isinstance(out, torch.Tensor):
        return [out] if out.is_floating_point() else []
    return [out] if jnp.issubdtype(out.dtype, jnp.inexact) else []


def score(out: Any) -> Any:
    """A number in which every output has a weight of its own."""
    total = 0.0
    for k, y in enumerate(leaves(out)):
        y = y.float() if isinstance(y, torch.Tensor) else y.astype(jnp.float32)
        total = total + ((1.0 + 0.3 * k) * y * y + y).sum()
    return total


def state(module: nn.Module) -> dict[str, bytes]:
    """Every tensor of a module bit by bit, plain attributes too; and its modes."""
    found: dict[str, Any] = {}
    for path, sub in module.named_modules():
        found[f"{path}.training"] = sub.training
        for table in (sub._parameters, sub._buffers, vars(sub)):
            for key, t in table.items():
                if isinstance(t, torch.Tensor):
                    found[f"{path}.{key}"] = (
                        t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                        if t.numel()
                        else b"",
                        not t.is_leaf or t.grad is None,
                        t.requires_grad,
                        id(t),
                    )
        found[f"{path}.keys"] = tuple(vars(sub))
    return found


def to_jax(x: Any) -> Any:
    return jnp.asarray(x.numpy()) if isinstance(x, torch.Tensor) else x


def agrees(
    module: nn.Module,
    *args: Any,
    train: bool = False,
    tolerance: float = 5e-5,
    keywords: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Outputs, new buffers and all gradients are torch's, eager and compiled; nothing changes."""
    keywords = keywords or {}
    before = state(module)
    apply, variables = from_module(module, **options)
    twin = copy.deepcopy(getattr(module, "_orig_mod", module)).train(train)
    watched = [
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in args
    ]
    out = twin(*watched, **keywords)
    score(out).backward()
    named = dict(twin.named_parameters())
    grads = {k: named[k].grad for k in variables["params"]}
    inputs = [to_jax(x) for x in args]
    where = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    jax_keywords = {k: to_jax(v) for k, v in keywords.items()}

    def loss(params: Any, chosen: Any) -> Any:
        full = list(inputs)
        for i, x in zip(where, chosen, strict=True):
            full[i] = x
        result = apply({**variables, "params": params}, *full, train=train, **jax_keywords)
        return score(result[0] if train else result), result

    plain = apply(variables, *inputs, train=train, **jax_keywords)
    plain = plain[0] if train else plain
    for k, (a, b) in enumerate(zip(leaves(plain), leaves(out), strict=True)):
        close(a, array(b), tolerance, f"output {k}")
    step = jax.grad(loss, argnums=(0, 1), has_aux=True)
    chosen = [inputs[i] for i in where]
    for run in (step, jax.jit(step)):
        (by_name, by_input), result = run(variables["params"], chosen)
        assert set(by_name) == set(grads)
        for name, g in by_name.items():
            expected = grads[name]
            expected = torch.zeros(g.shape) if expected is None else expected
            close(g, array(expected), tolerance, name)
        for i, g in zip(where, by_input, strict=True):
            expected = watched[i].grad
            close(g, 0 * g if expected is None else array(expected), tolerance, f"input {i}")
        if train:
            after = dict(twin.named_buffers())
            assert set(result[1]) == set(variables["buffers"])
            for name, b in result[1].items():
                close(b, array(after[name]), tolerance, name)
    assert state(module) == before, "the module was changed"
    assert tape_info().entries == 0
    return apply, variables


# --- layers ------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(4 * 9, 3)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_batch_norm(train):
    module = Normed()
    apply, variables = agrees(module, torch.randn(4, 2, 5, 5), train=train)
    if train:
        _, new = apply(variables, jnp.ones((4, 2, 5, 5)), train=True)
        assert new["body.1.num_batches_tracked"] == 1
        _, new = apply({**variables, "buffers": new}, jnp.ones((4, 2, 5, 5)), train=True)
        assert new["body.1.num_batches_tracked"] == 2
        loaded = copy.deepcopy(module)
        loaded.load_state_dict(to_state_dict({**variables, "buffers": new}, apply))
        assert loaded.body[1].num_batches_tracked.dtype is torch.int64
        assert int(loaded.body[1].num_batches_tracked) == 2


def test_batch_norm_over_many_steps():
    module = nn.BatchNorm1d(3)
    twin = copy.deepcopy(module).train()
    apply, variables = from_module(module)
    xs = torch.randn(5, 4, 3)

    def step(buffers, x):
        y, buffers = apply({**variables, "buffers": buffers}, x, train=True)
        return buffers, y

    buffers, ys = jax.lax.scan(step, variables["buffers"], jnp.asarray(xs.numpy()))
    for k in range(5):
        close(ys[k], array(twin(xs[k])))
    for name, b in twin.named_buffers():
        close(buffers[name], array(b))
    assert int(module.num_batches_tracked) == 0


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent(cell, bidirectional, train):
    module = cell(3, 4, num_layers=2, bidirectional=bidirectional, batch_first=True)
    agrees(module, torch.randn(2, 5, 3), train=train)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_recurrent_with_state_and_projection():
    module = nn.LSTM(3, 4, proj_size=2)
    x, h, c = torch.randn(5, 2, 3), torch.randn(1, 2, 2), torch.randn(1, 2, 4)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = module

        def forward(self, x, h, c):
            y, (h, c) = self.rnn(x, (h, c))
            return {"y": y, "state": (h, [c])}

    agrees(Wrapped(), x, h, c)


def test_recurrent_dropout_needs_a_key_and_repeats():
    module = nn.LSTM(3, 4, num_layers=2, dropout=0.5)
    apply, variables = from_module(module)
    x = jnp.ones((5, 2, 3))
    with pytest.raises(SignatureError, match="rng="):
        apply(variables, x, train=True)
    key = jax.random.key(0)
    (a, _), _ = apply(variables, x, train=True, rng=key)
    (b, _), _ = jax.jit(lambda k: apply(variables, x, train=True, rng=k))(key)
    (c, _), _ = apply(variables, x, train=True, rng=jax.random.key(1))
    close(a, b, 0)
    assert not np.allclose(a, c)
    (d, _) = apply(variables, x)
    close(d, array(module.eval()(torch.ones(5, 2, 3))[0]))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_layer(train, norm_first):
    module = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    agrees(module, torch.randn(2, 5, 8), train=train)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_fast_path_is_right():
    """In eval mode without gradients torch takes another kernel."""
    module = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=True
    ).eval()
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = module(x, src_key_padding_mask=padding)
    apply, variables = from_module(module)
    out = apply(
        variables, jnp.asarray(x.numpy()), src_key_padding_mask=jnp.asarray(padding.numpy())
    )
    close(out, array(expected))
    with torch.no_grad():
        plain = module(x)
    close(jax.jit(lambda x: apply(variables, x))(jnp.asarray(x.numpy())), array(plain))


def test_multihead_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True, kdim=4, vdim=6)

        def forward(self, q, k, v, mask):
            return self.mha(q, k, v, attn_mask=mask, average_attn_weights=False)

    mask = torch.triu(torch.ones(3, 4, dtype=torch.bool), 2)
    agrees(Attention(), torch.randn(2, 3, 8), torch.randn(2, 4, 4), torch.randn(2, 4, 6), mask)


def test_embedding_and_int64_labels():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4, padding_idx=0)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens, labels):
            logits = self.head(self.embed(tokens))
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    tokens, labels = torch.randint(0, 10, (2, 3)), torch.randint(0, 10, (2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Torch2JaxWarning)
        agrees(Classifier(), tokens, labels)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "decorate",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        torch.nn.utils.spectral_norm,
        torch.nn.utils.weight_norm,
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old_spectral_norm", "old_weight_norm"],
)
def test_parametrizations(decorate, train):
    # (Without gradients: torch cannot copy a module whose weight is computed with them.)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module = nn.Sequential(decorate(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2))
    agrees(module, torch.randn(3, 4), train=train, tolerance=2e-4)


def test_own_parametrization():
    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).T

    module = nn.Linear(4, 4)
    parametrize.register_parametrization(module, "weight", Symmetric())
    apply, variables = agrees(module, torch.randn(3, 4))
    assert "parametrizations.weight.original" in variables["params"]
    copy.deepcopy(module).load_state_dict(to_state_dict(variables, apply))


# --- structure ---------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.c = self.a  # the same module
        self.list = nn.ParameterList([self.a.bias, nn.Parameter(torch.ones(4))])

    def forward(self, x):
        return self.c(self.b(self.a(x)).tanh()) * self.list[1] + self.list[0]


def test_tied_weights():
    module = Tied()
    _, variables = agrees(module, torch.randn(3, 4))
    assert sorted(variables["params"]) == ["a.bias", "a.weight", "b.bias", "list.1"]
    state = to_state_dict(variables, module)
    assert list(state) == list(module.state_dict())
    for name, t in module.state_dict().items():
        assert torch.equal(state[name], t)


def test_frozen_parameters_cost_nothing():
    counts = {"first": 0, "input": 0}

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            counts["input"] += ctx.needs_input_grad[0]
            counts["first"] += ctx.needs_input_grad[1]
            return g * w, g * x

    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.ones(3), requires_grad=False)
            self.second = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return Noted.apply(x, self.first) * self.second

    module = Partly()
    apply, variables = from_module(module)
    assert set(variables["frozen"]) == {"first"}
    x = jnp.arange(3.0)
    grads = jax.grad(lambda v: apply(v, x).sum())(variables)
    assert counts == {"first": 0, "input": 0}
    close(grads["frozen"]["first"], np.zeros(3))
    close(grads["params"]["second"], x)
    jax.grad(lambda v, x: apply(v, x).sum(), (0, 1))(variables, x)
    assert counts == {"first": 0, "input": 1}
    assert not module.first.requires_grad


def test_buffers_in_their_own_dtypes():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("low", torch.randn(3).bfloat16())
            self.register_buffer("steps", torch.tensor(7))
            self.register_buffer("flags", torch.tensor([True, False, True]))
            self.register_buffer("small", torch.tensor([1, 2, 250], dtype=torch.uint8))
            self.weight = nn.Parameter(torch.randn(3).bfloat16())

        def forward(self, x):
            assert self.low.dtype is torch.bfloat16
            assert self.steps.dtype is torch.int64
            assert self.flags.dtype is torch.bool
            assert self.small.dtype is torch.uint8
            if self.training:
                self.steps += 1
            return (x.bfloat16() * self.low * self.weight * self.flags).float() + self.steps

    module = Mixed()
    for train in (False, True):
        apply, variables = agrees(module, torch.randn(3), train=train, tolerance=2e-2)
    assert variables["buffers"]["low"].dtype == jnp.bfloat16
    _, new = apply(variables, jnp.ones(3), train=True)
    for given in (apply, module):
        state = to_state_dict({**variables, "buffers": new}, given)
        assert {k: t.dtype for k, t in state.items()} == {
            k: t.dtype for k, t in module.state_dict().items()
        }
        assert int(state["steps"]) == 8


def test_bfloat16_module():
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(torch.bfloat16)
    apply, variables = from_module(module)
    x = torch.randn(3, 4)
    out = apply(variables, jnp.asarray(x.numpy()).astype(jnp.bfloat16))
    close(out.astype(jnp.float32), array(module(x.bfloat16())), 1e-2)
    loaded = copy.deepcopy(module)
    loaded.load_state_dict(to_state_dict(variables))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters()))  # noqa: B905


def test_keywords_and_nested_outputs():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x, *, scale=None, mode="sum", flip=False, extra=None):
            y = self.linear(x)
            y = y if scale is None else y * scale
            y = -y if flip else y
            y = y + extra["deep"][0] if extra else y
            return {"a": (y, [y.sin(), None]), "b": {"c": y.sum() if mode == "sum" else y.mean()}}

    module = Nested()
    x, s = torch.randn(2, 3), torch.randn(3)
    agrees(module, x)
    agrees(module, x, keywords={"scale": s, "mode": "mean", "flip": True})
    apply, variables = from_module(module)
    deep = jnp.ones(3)
    g = jax.grad(
        lambda d: score(apply(variables, jnp.asarray(x.numpy()), extra={"deep": [d, None]}))
    )(deep)
    assert g.shape == (3,)
    assert float(abs(g).min()) > 0


@pytest.mark.parametrize("keyword", ["train", "rng", "kwargs"])
def test_clashing_keywords(keyword):
    scope: dict[str, Any] = {}
    exec(f"def forward(self, x, {keyword}=None):\n    return x * {keyword}", scope)
    module = type("Clashing", (nn.Module,), {"forward": scope["forward"]})()
    with pytest.raises(SignatureError, match=rf"(?s){keyword}.*kwargs={{"):
        from_module(module)
    apply, variables = from_module(module, kwargs=True)
    x = jnp.arange(3.0)
    close(apply(variables, x, kwargs={keyword: x}), x * x)
    close(jax.grad(lambda x: apply(variables, x, kwargs={keyword: x}).sum())(x), 2 * x)
    out, _ = apply(variables, x, train=True, kwargs={keyword: x})
    close(out, x * x)
    with pytest.raises(SignatureError, match="kwargs="):
        apply(variables, x, other=x)


def test_module_keyword_named_variables():
    class Odd(nn.Module):
        def forward(self, x, variables=None):
            return x if variables is None else x * variables

    x = jnp.arange(3.0)
    try:
        apply, variables = from_module(Odd())
    except SignatureError:
        apply, variables = from_module(Odd(), kwargs=True)
        close(apply(variables, x, kwargs={"variables": x}), x * x)
        return
    close(apply(variables, x, variables=x), x * x)


def test_forward_hooks():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.full((3,), 1.5))
            self.register_forward_pre_hook(lambda m, args: (args[0] * m.scale,))
            self.linear.register_forward_hook(lambda m, args, out: out + m.weight.sum())
            self.linear.register_forward_hook(
                lambda m, args, kwargs, out: out * 2, with_kwargs=True, prepend=True
            )
            self.register_forward_hook(self.after)

        def after(self, module, args, out):
            return out * self.scale  # a bound method: of the replica

        def forward(self, x):
            return self.linear(x).tanh()

    agrees(Scaled(), torch.randn(2, 3))


def test_backward_hooks():
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    module[1].register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))
    module[2].register_full_backward_pre_hook(lambda m, go: (go[0] * 3,))
    agrees(module, torch.randn(2, 3))


def test_lazy_modules_are_initialised_on_a_copy():
    module = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    _, variables = from_module(module, torch.randn(3, 5))
    assert variables["params"]["0.weight"].shape == (4, 5)
    assert isinstance(module[0].weight, nn.UninitializedParameter)


def test_lazy_modules():
    module = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyBatchNorm1d())
    with pytest.raises(SignatureError, match="lazy"):
        from_module(module)
    x = torch.randn(3, 5)
    apply, variables = from_module(module, x)
    assert variables["params"]["0.weight"].shape == (4, 5)
    out = apply(variables, jnp.asarray(x.numpy()))
    module.load_state_dict(to_state_dict(variables))
    module.eval()
    close(out, array(module(x)))
    agrees(module, x)


class Caching(nn.Module):
    """Keeps what it computes first from its weights and the length of its input."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(4))
        if kind == "dict":
            self.cache = {}
        elif kind == "preset":
            self.cache = {"w": None}
        elif kind == "list":
            self.cache = []
        elif kind == "slot":
            self.cache = [None]
        elif kind == "nested":
            self.cache = {"deep": {}}
        elif kind == "namespace":
            self.cache = types.SimpleNamespace()
        elif kind == "attribute":
            self.cache = None
        elif kind == "buffer":
            self.register_buffer("cache", None, persistent=False)
        elif kind == "persistent":
            self.register_buffer("cache", None)

    def find(self) -> Any:
        if self.kind in ("dict", "preset"):
            return self.cache.get("w")
        if self.kind in ("list", "slot"):
            return self.cache[0] if self.cache else None
        if self.kind == "nested":
            return self.cache["deep"].get("w")
        if self.kind == "namespace":
            return getattr(self.cache, "w", None)
        return getattr(self, "cache", None)

    def keep(self, w: torch.Tensor) -> None:
        if self.kind in ("dict", "preset"):
            self.cache["w"] = w
        elif self.kind == "list":
            self.cache.append(w)
        elif self.kind == "slot":
            self.cache[0] = w
        elif self.kind == "nested":
            self.cache["deep"]["w"] = w
        elif self.kind == "namespace":
            self.cache.w = w
        else:
            self.cache = w

    def forward(self, x):
        w = self.find()
        if w is None:
            w = self.weight * torch.arange(1.0, 5.0)
            self.keep(w)
        return x * w


KINDS = ["dict", "preset", "list", "slot", "nested", "namespace", "attribute", "new_attribute"]


@pytest.mark.parametrize("kind", [*KINDS, "buffer", "persistent"])
def test_modules_that_cache_at_first_use(kind):
    """A cache holds for one call: it is computed from that call's variables."""
    apply, variables = agrees(Caching(kind), torch.randn(2, 4))
    x = jnp.ones((2, 4))
    first = apply(variables, x)
    doubled = jax.tree.map(lambda p: 2 * p, variables)
    close(apply(doubled, x), 2 * first)
    close(jax.jit(apply)(doubled, x), 2 * first)


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_masks_cached_at_first_use(kind):
    """The usual pattern: a causal mask, made anew for longer inputs."""

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            if kind == "buffer":
                self.register_buffer("mask", None, persistent=False)
            else:
                self.mask = None

        def find(self, n):
            if self.mask is None or self.mask.shape[-1] < n:
                mask = torch.tril(torch.ones(n, n))
                if kind == "buffer":
                    self.register_buffer("mask", mask, persistent=False)
                else:
                    self.mask = mask
            return self.mask[:n, :n]

        def forward(self, x):
            return self.find(x.shape[0]) @ self.linear(x)

    module = Causal()
    for n in (3, 2, 5):
        agrees(module, torch.randn(n, 4))
    apply, variables = from_module(module)
    for n in (3, 2, 5, 3):
        x = torch.randn(n, 4)
        close(apply(variables, jnp.asarray(x.numpy())), array(copy.deepcopy(module)(x)))


@pytest.mark.parametrize("kind", ["non_persistent", "attribute", "list"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_tensors_that_are_no_variables_stay(kind, train):
    """What is neither parameter nor persistent buffer cannot move: calls repeat, modules stay."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            if kind == "non_persistent":
                self.register_buffer("n", torch.zeros(()), persistent=False)
            else:
                self.n = torch.zeros(()) if kind == "attribute" else [torch.zeros(())]

        def forward(self, x):
            n = self.n[0] if kind == "list" else self.n
            n.add_(1)
            return self.linear(x) * n

    module = Counting()
    before = state(module)
    apply, variables = from_module(module)
    x = torch.randn(2, 3)
    expected = array(module.linear(x))
    for _ in range(3):
        out = apply(variables, jnp.asarray(x.numpy()), train=train)
        close(out[0] if train else out, expected)
    assert state(module) == before
    if kind == "list":
        assert float(module.n[0]) == 0


def test_plain_and_non_persistent_tensors_are_constants():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.shift = torch.randn(3)
            self.tables = {"a": [torch.randn(3)]}
            self.register_buffer("freq", torch.randn(3), persistent=False)

        def forward(self, x):
            return self.linear(x) * self.shift + self.tables["a"][0] * self.freq

    _, variables = agrees(Plain(), torch.randn(2, 3))
    assert variables["buffers"] == {}


# --- checkpoints, compiled modules -------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, style: str = "method"):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.reentrant, self.style = reentrant, style

    def inner(self, x):
        return self.block(x) * self.scale

    def forward(self, x):
        x = self.first(x)
        if self.style == "method":
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)
        if self.style == "module":
            return checkpoint(self.block, x, use_reentrant=self.reentrant) * self.scale
        scale = self.scale
        return checkpoint(lambda t: t.sin() * scale, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("style", ["method", "module", "closure"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoint_inside(reentrant, style, train):
    module = Checkpointed(reentrant, style)
    apply, variables = agrees(module, torch.randn(3, 4), train=train)
    x = jnp.ones((3, 4))

    def loss(scale):
        params = jax.tree.map(lambda p: p * scale, variables["params"])
        out = apply({**variables, "params": params}, x, train=train)
        return score(out[0] if train else out)

    # Other variables in every step: the block that runs again must use those of its own call.
    scales = jnp.array([0.5, 1.0, 1.5, 2.0])
    grads = jax.jit(lambda s: jax.lax.scan(lambda c, k: (c, jax.grad(loss)(k)), 0, s)[1])(scales)
    for s, g in zip(scales.tolist(), grads.tolist(), strict=True):
        twin = copy.deepcopy(module)
        for p in twin.parameters():
            p.data.mul_(s)
        score(twin(torch.ones(3, 4))).backward()
        want = sum(
            float((p.grad * p.detach()).sum()) for p in twin.parameters() if p.grad is not None
        )
        np.testing.assert_allclose(g, want / s, 2e-4)
    assert tape_info().entries == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoint_inside_with_several_live_graphs(reentrant):
    """Graphs of several calls wait for their backward passes, which come in any order."""
    apply, variables = from_module(Checkpointed(reentrant))
    x = jnp.ones((3, 4))
    scaled = [jax.tree.map(lambda p, k=k: p * k, variables["params"]) for k in (0.5, 1.0, 2.0)]

    def forward(params, x):
        return score(apply({**variables, "params": params}, x))

    expected = [jax.grad(forward, (0, 1))(p, x) for p in scaled]
    pulls = [jax.vjp(forward, p, x)[1] for p in scaled]
    for k in (1, 2, 0):
        for a, b in zip(jax.tree.leaves(pulls[k](1.0)), jax.tree.leaves(expected[k]), strict=True):
            close(a, b, 1e-6)
    for k in (1, 0):  # and again
        for a, b in zip(jax.tree.leaves(pulls[k](1.0)), jax.tree.leaves(expected[k]), strict=True):
            close(a, b, 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.filterwarnings("ignore:.*row by row")
def test_checkpoint_inside_other_transforms(reentrant):
    apply, variables = from_module(Checkpointed(reentrant))
    x = jnp.linspace(-1, 1, 24).reshape(2, 3, 4)

    def by_hand(params, x):
        y = x @ params["first.weight"].T + params["first.bias"]
        y = jnp.tanh(y @ params["block.0.weight"].T + params["block.0.bias"])
        return (y @ params["block.2.weight"].T + params["block.2.bias"]) * params["scale"]

    def bridged(params, x):
        return apply({**variables, "params": params}, x)

    p = variables["params"]
    for transform in (
        lambda f: jax.vmap(f, (None, 0)),
        lambda f: jax.vmap(jax.grad(lambda p, x: score(f(p, x))), (None, 0)),
        lambda f: jax.grad(lambda p, x: score(jax.vmap(f, (None, 0))(p, x))),
        lambda f: lambda p, x: jax.jacrev(f)(p, x[0]),
        lambda f: lambda p, x: jax.jit(jax.grad(jax.checkpoint(lambda p: score(f(p, x)))))(p),
    ):
        a, b = transform(bridged)(p, x), transform(by_hand)(p, x)
        for got, want in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            close(got, want, 1e-4)


@pytest.mark.parametrize("inplace", [False, True], ids=["wrapped", "in_place"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compiled_modules(inplace, train):
    inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    if inplace:
        inner.compile(backend="aot_eager")
        module = inner
        apply, variables = from_module(module)
        x = torch.randn(3, 4)
        out = apply(variables, jnp.asarray(x.numpy()), train=train)
        twin = copy.deepcopy(inner)
        twin._compiled_call_impl = None
        close(out[0] if train else out, array(twin.train(train)(x)))
        return
    module = torch.compile(inner, backend="aot_eager")
    apply, variables = agrees(module, torch.randn(3, 4), train=train)
    assert list(to_state_dict(variables, module)) == list(module.state_dict())
    copy.deepcopy(inner).load_state_dict(to_state_dict(variables))


# --- transforms --------------------------------------------------------------------------------


@pytest.fixture
def mlp() -> tuple[nn.Module, Any, Any]:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    apply, variables = from_module(module)
    return module, apply, variables


def mlp_twin(params: Any, x: jax.Array) -> jax.Array:
    y = jnp.tanh(x @ params["0.weight"].T + params["0.bias"])
    return y @ params["2.weight"].T + params["2.bias"]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.vmap(f, (None, 0)),
        lambda f: jax.vmap(jax.grad(lambda p, x: score(f(p, x))), (None, 0)),
        lambda f: lambda p, x: jax.jvp(jax.grad(lambda p: score(f(p, x))), (p,), (p,))[1],
        lambda f: (
            lambda p, x: jax.grad(
                lambda p: sum(
                    (g**2).sum() for g in jax.tree.leaves(jax.grad(lambda p: score(f(p, x)))(p))
                )
            )(p)
        ),
        lambda f: jax.jacfwd(f, 1),
        lambda f: jax.jacrev(f),
        lambda f: lambda p, x: jax.hessian(lambda x: score(f(p, x)))(x[0]),
        lambda f: (
            lambda p, x: jax.vmap(lambda s: f(jax.tree.map(lambda q: q * s, p), x))(
                jnp.array([0.5, 2.0])
            )
        ),
        lambda f: (
            lambda p, x: jax.lax.scan(
                lambda p, row: (
                    jax.tree.map(
                        lambda q, g: q - 0.1 * g, p, jax.grad(lambda p: score(f(p, row)))(p)
                    ),
                    score(f(p, row)),
                ),
                p,
                x,
            )
        ),
    ],
    ids=["vmap", "per_example", "hvp", "gg", "jacfwd", "jacrev", "hessian", "ensemble", "sgd"],
)
def test_transforms(mlp, transform, jit):
    _, apply, variables = mlp
    x = jnp.linspace(-1, 1, 15).reshape(5, 3)

    def bridged(params, x):
        return apply({**variables, "params": params}, x)

    maybe = jax.jit if jit else (lambda f: f)
    actual = maybe(transform(bridged))(variables["params"], x)
    expected = transform(mlp_twin)(variables["params"], x)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        close(got, want, 3e-4)
    assert tape_info().entries == 0


@pytest.mark.parametrize("options", [{"depth": 1}, {"residuals": "recompute"}, {"depth": 2}])
def test_options(mlp, options):
    module, _, _ = mlp
    agrees(module, torch.randn(5, 3), **options)


def test_vmap_of_training_batch_norm():
    module = nn.BatchNorm1d(3)
    apply, variables = from_module(module, vmap_method="sequential")
    x = jnp.linspace(0, 1, 24).reshape(2, 4, 3) ** 2
    y, new = jax.vmap(lambda x: apply(variables, x, train=True))(x)
    for k in range(2):
        twin = copy.deepcopy(module).train()
        close(y[k], array(twin(torch.tensor(np.array(x[k])))))
        close(new["running_var"][k], array(twin.running_var))


def test_dropout_module():
    module = nn.Sequential(nn.Linear(3, 64, bias=False), nn.Dropout(0.25))
    apply, variables = from_module(module)
    x, key = jnp.ones((2, 3)), jax.random.key(3)
    with pytest.raises(SignatureError, match="rng="):
        apply(variables, x, train=True)
    close(apply(variables, x, rng=key), apply(variables, x))
    before = torch.get_rng_state()

    def loss(w):
        out, _ = apply({**variables, "params": {"0.weight": w}}, x, train=True, rng=key)
        return out.sum(), out

    for run in (jax.grad(loss, has_aux=True), jax.jit(jax.grad(loss, has_aux=True))):
        g, out = run(variables["params"]["0.weight"])
        mask = np.asarray(out) != 0
        assert 0.1 < 1 - mask.mean() < 0.4
        close(g, (mask / 0.75).sum(0)[:, None] * np.ones((64, 3)))
    assert torch.equal(before, torch.get_rng_state())
    assert module.training


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_dropout_in_a_checkpoint(reentrant):
    """The block draws again in its backward pass: the same mask, and torch's generator stays."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64))
            self.drop = nn.Dropout(0.25)

        def forward(self, x):
            y = x * self.scale
            return checkpoint(lambda t: self.drop(t) * 1.0, y, use_reentrant=reentrant)

    apply, variables = from_module(Block())
    x = jnp.arange(1.0, 65.0)
    before = torch.get_rng_state()

    def loss(p, key):
        out, _ = apply({**variables, "params": p}, x, train=True, rng=key)
        return out.sum(), out

    step = jax.jit(jax.grad(loss, has_aux=True))
    for seed in range(4):
        g, out = step(variables["params"], jax.random.key(seed))
        close(g["scale"], out, 1e-5)
    assert torch.equal(before, torch.get_rng_state())
    failed: list[Any] = []

    def work(seed: int) -> None:
        for n in range(25):
            g, out = step(variables["params"], jax.random.key(100 * seed + n))
            if not np.allclose(g["scale"], out):
                failed.append(seed)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    assert torch.equal(before, torch.get_rng_state())


# --- variables and errors ----------------------------------------------------------------------


def test_variables_are_copies(mlp):
    module, apply, variables = mlp
    x = jnp.ones((1, 3))
    before = apply(variables, x)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    close(apply(variables, x), before, 0)
    assert float(abs(variables["params"]["0.weight"]).sum()) > 0
    state = to_state_dict(variables)
    state["0.weight"].zero_()
    assert float(abs(variables["params"]["0.weight"]).sum()) > 0


@pytest.mark.parametrize("with_module", [False, True])
def test_state_dict_round_trip(with_module):
    module = Normed()
    _, variables = from_module(module)
    moved = jax.tree.map(lambda p: p + 1, variables)
    state = to_state_dict(moved, module if with_module else None)
    other = Normed()
    other.load_state_dict(state)
    for (name, a), b in zip(other.state_dict().items(), module.state_dict().values(), strict=True):
        assert a.dtype == b.dtype
        close(array(a), array(b) + 1, 1e-6, name)
    _, again = from_module(other)
    assert jax.tree.structure(again) == jax.tree.structure(variables)


def test_wrong_variables(mlp):
    _, apply, variables = mlp
    x = jnp.ones((1, 3))
    params = dict(variables["params"])
    params["weights"] = params.pop("0.weight")
    with pytest.raises(SignatureError, match=r"missing: 0\.weight; unknown: weights"):
        apply({**variables, "params": params}, x)
    with pytest.raises(SignatureError, match="frozen"):
        apply(variables["params"], x)
    with pytest.raises(SignatureError, match="params"):
        apply(None, x)
    with pytest.raises(SignatureError, match=r"torch\.nn\.Module"):
        from_module(lambda x: x)
    with pytest.raises((SignatureError, TorchCallError), match="shape"):
        apply(variables, jnp.ones((1, 7)))
    close(apply(variables, x), mlp_twin(variables["params"], x))  # and the next call works


def test_wrong_argument_names(mlp):
    _, apply, variables = mlp
    with pytest.raises((SignatureError, TorchCallError), match="bogus"):
        apply(variables, jnp.ones((1, 3)), bogus=1)


def test_errors_in_forward_leave_replicas_whole():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.seen = []

        def forward(self, x, limit):
            y = self.linear(x)
            self.seen.append(1)
            if float(x.sum()) > float(limit):
                raise ArithmeticError("too much")
            return y * len(self.seen)

    apply, variables = from_module(Fails(), output_shapes=jax.ShapeDtypeStruct((1, 3), "float32"))
    x = jnp.ones((1, 3))
    good = apply(variables, x, 10.0)
    for _ in range(3):
        with pytest.raises(TorchCallError, match="too much"):
            jax.block_until_ready(apply(variables, x, 1.0))
        close(apply(variables, x, 10.0), good, 0)


def test_wrapping_twice_is_independent():
    module = nn.Linear(3, 3)
    (f, v), (g, w) = from_module(module), from_module(module)
    doubled = jax.tree.map(lambda p: 2 * p, w)
    x = jnp.ones((1, 3))
    close(2 * f(v, x), g(doubled, x))


def test_training_mode_of_the_module_does_not_matter():
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9))
    x = jnp.ones((1, 3))
    outs = []
    for mode in (True, False):
        module.train(mode)
        apply, variables = from_module(module)
        outs.append(apply(variables, x))
        assert module.training is mode
    close(outs[0], outs[1], 0)


def test_threads_share_a_module(mlp):
    _, apply, variables = mlp
    x = jnp.linspace(-1, 1, 15).reshape(5, 3)
    step = jax.jit(jax.value_and_grad(lambda p: score(apply({**variables, "params": p}, x))))
    scaled = [jax.tree.map(lambda p, k=k: p * k, variables["params"]) for k in (0.5, 1.0, 2.0)]
    expected = [jax.device_get(step(p)) for p in scaled]
    wrong: list[int] = []

    def work(first: int) -> None:
        for n in range(first, first + 100):
            out = jax.device_get(step(scaled[n % 3]))
            same = jax.tree.map(np.array_equal, out, expected[n % 3])
            if not all(jax.tree.leaves(same)):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_variables_that_are_not_the_modules() -> None:
    module = torch.nn.Linear(2, 2)
    _, variables = from_module(module)
    with pytest.raises(SignatureError, match="got the key 'weight'"):
        to_state_dict(variables["params"])
    with pytest.raises(SignatureError, match="has no bias, weight"):
        to_state_dict(variables, torch.nn.Sequential(module))
    with pytest.raises(SignatureError, match="stochastic"):
        from_module(module, stochastic=True)
