"""Hugging Face's models with random weights: values and all gradients are torch's own.

Nothing is downloaded: each model is made from a tiny configuration.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torch2jax import (
    SignatureError,
    Torch2JaxWarning,
    clear_tape,
    from_module,
    tape_info,
    to_state_dict,
)

transformers = pytest.importorskip("transformers", reason="transformers is a test dependency")

TOKENS = torch.tensor([[5, 3, 8, 1, 9, 4], [2, 7, 7, 6, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}


def bert(**options: Any) -> Any:
    config = transformers.BertConfig(
        **SIZES, vocab_size=12, intermediate_size=24, max_position_embeddings=8, **options
    )
    return transformers.BertForSequenceClassification(config)


def vit(**options: Any) -> Any:
    config = transformers.ViTConfig(
        **SIZES, intermediate_size=24, image_size=8, patch_size=4, num_labels=3, **options
    )
    return transformers.ViTForImageClassification(config)


def gpt2(**options: Any) -> Any:
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=12, n_positions=8,
        bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(**options: Any) -> Any:
    config = transformers.LlamaConfig(
        **SIZES, vocab_size=12, intermediate_size=24, num_key_value_heads=1,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def t5(**options: Any) -> Any:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=12,
        decoder_start_token_id=0, **options,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


TEXT = {"input_ids": TOKENS, "attention_mask": MASK}
# model, its inputs, and what sets every dropout rate
MODELS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, float]]] = {
    "bert": (
        bert,
        {**TEXT, "labels": torch.tensor([1, 0])},
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "vit": (
        vit,
        {"pixel_values": torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8)},
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "gpt2": (
        gpt2,
        {**TEXT, "labels": TOKENS, "use_cache": False},
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "llama": (llama, {**TEXT, "labels": TOKENS, "use_cache": False}, {}),
    "t5": (
        t5,
        {**TEXT, "labels": TOKENS[:, :4].contiguous(), "use_cache": False},
        {"dropout_rate": 0.0},
    ),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    clear_tape()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*reach it as int64.*", Torch2JaxWarning)
        warnings.filterwarnings("ignore", module="transformers")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
    clear_tape()


def to_jax(x: Any) -> Any:
    return jnp.asarray(x.numpy()) if isinstance(x, torch.Tensor) else x


def inexact(out: Any) -> dict[str, Any]:
    """Float tensors of an output, by name; tuples of tensors by name and index."""
    found = {}
    for name, value in sorted(dict(out).items()):
        values = value if isinstance(value, list | tuple) else (value,)
        for k, y in enumerate(values):
            found[f"{name}{k}"] = y
    return found


def score(out: Any) -> Any:
    total = 0.0
    for k, y in enumerate(inexact(out).values()):
        total = total + (y * y * (1 + k / 2) + y).mean()
    return total


def close(actual: Any, expected: Any, where: str = "", tolerance: float = 2e-4) -> None:
    np.testing.assert_allclose(
        np.asarray(actual), np.asarray(expected), tolerance, tolerance, err_msg=where
    )


def torch_result(model: Any, inputs: dict[str, Any], train: bool) -> tuple[Any, dict[str, Any]]:
    twin = copy.deepcopy(model).train(train)
    out = twin(**inputs)
    score(out).backward()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in twin.named_parameters()
    }
    return out, grads


def agrees(model: Any, inputs: dict[str, Any], train: bool = False, **options: Any) -> None:
    before = {k: t.clone() for k, t in model.state_dict().items()}
    mode = model.training
    expected, grads = torch_result(model, inputs, train)
    apply, variables = from_module(model, **options)
    arrays = {k: to_jax(x) for k, x in inputs.items() if isinstance(x, torch.Tensor)}
    static = {k: x for k, x in inputs.items() if k not in arrays}

    def run(params: Any, arrays: Any) -> Any:
        out = apply({**variables, "params": params}, train=train, **arrays, **static)
        return out[0] if train else out

    def loss(params: Any, arrays: Any) -> Any:
        out = run(params, arrays)
        return score(out), out

    plain = run(variables["params"], arrays)
    assert isinstance(plain, dict)
    assert set(plain) == set(expected.keys())
    for name, y in inexact(expected).items():
        close(inexact(plain)[name], y.detach(), name)
    step = jax.jit(jax.grad(loss, has_aux=True))
    for _ in range(2):
        by_name, out = step(variables["params"], arrays)
        close(out["logits"], expected["logits"].detach())
        assert set(by_name) == set(grads)
        for name, g in by_name.items():
            close(g, grads[name], name)
    # Other weights in the same program.
    moved = jax.tree.map(lambda p: 1.1 * p, variables)
    other = copy.deepcopy(model)
    other.load_state_dict(to_state_dict(moved, apply))
    _, grads = torch_result(other, inputs, train)
    by_name, _ = step(moved["params"], arrays)
    if not variables["frozen"]:
        for name, g in by_name.items():
            close(g, grads[name], name)
    assert model.training is mode
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert all(p.grad is None for p in model.parameters())
    assert tape_info().entries == 0


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", list(MODELS))
def test_values_and_all_gradients(name, train):
    make, inputs, no_dropout = MODELS[name]
    agrees(make(**no_dropout), inputs, train)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing(name, reentrant):
    """The blocks run again in backward, on the weights of their own call."""
    make, inputs, no_dropout = MODELS[name]
    model = make(**no_dropout)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    agrees(model, inputs, train=True)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_dropout_with_a_key(name, checkpointing):
    """By finite differences: the gradient is that of the masks that its own forward drew."""
    make, inputs, _ = MODELS[name]
    model = make()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    apply, variables = from_module(model)
    arrays = {k: to_jax(x) for k, x in inputs.items() if isinstance(x, torch.Tensor)}
    static = {k: x for k, x in inputs.items() if k not in arrays}
    with pytest.raises(SignatureError, match="rng="):
        apply(variables, train=True, **arrays, **static)
    generator = torch.get_rng_state()

    @jax.jit
    def loss(params, key):
        out, _ = apply({**variables, "params": params}, train=True, rng=key, **arrays, **static)
        return 100 * out["logits"].mean(), out["logits"]

    key = jax.random.key(1)
    params = variables["params"]
    names = sorted(params)
    rng = np.random.default_rng(0)
    direction = {k: jnp.asarray(rng.standard_normal(params[k].shape), jnp.float32) for k in names}
    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params, key)
    slope = sum(float((grads[k] * direction[k]).sum()) for k in names)
    eps = 1e-3
    ends = [
        float(loss({k: params[k] + s * eps * direction[k] for k in names}, key)[0]) for s in (1, -1)
    ]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * eps), 5e-2)
    close(logits, loss(params, key)[1], tolerance=1e-6)
    assert not np.allclose(logits, loss(params, jax.random.key(2))[1])
    assert torch.equal(torch.get_rng_state(), generator)


def test_hidden_states_and_attentions():
    model = bert(**MODELS["bert"][2], attn_implementation="eager")
    inputs = {**TEXT, "output_hidden_states": True, "output_attentions": True}
    agrees(model, inputs)


def test_tuples_instead_of_a_dict():
    apply, variables = from_module(vit(**MODELS["vit"][2]))
    pixels = to_jax(MODELS["vit"][1]["pixel_values"])
    (logits,) = apply(variables, pixel_values=pixels, return_dict=False)
    close(logits, apply(variables, pixels)["logits"])


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_cache_is_refused_with_its_remedy(name):
    make, inputs, _ = MODELS[name]
    apply, variables = from_module(make())
    arrays = {k: to_jax(x) for k, x in inputs.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(SignatureError, match=r"\['past_key_values'\]: \w*Cache; .*use_cache=False"):
        apply(variables, **arrays, use_cache=True)
    out = apply(variables, **arrays, use_cache=False)
    assert "past_key_values" not in out


def test_labels_beyond_int32_policy():
    """int32 labels are int64 for torch, with one note; -100 is ignored as in torch."""
    model = gpt2(**MODELS["gpt2"][2])
    labels = TOKENS.clone()
    labels[MASK == 0] = -100
    agrees(model, {**TEXT, "labels": labels, "use_cache": False})


def test_tied_weights_are_one_leaf():
    model = gpt2()
    apply, variables = from_module(model)
    assert "transformer.wte.weight" in variables["params"]
    assert "lm_head.weight" not in variables["params"]
    state = to_state_dict(variables, apply)
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])
    copy.deepcopy(model).load_state_dict(state)


def test_frozen_encoder():
    model = bert(**MODELS["bert"][2])
    for p in model.bert.parameters():
        p.requires_grad_(False)
    apply, variables = from_module(model)
    assert set(variables["params"]) == {"classifier.weight", "classifier.bias"}
    inputs = {k: to_jax(x) for k, x in MODELS["bert"][1].items()}
    grads = jax.jit(jax.grad(lambda p: apply({**variables, "params": p}, **inputs)["loss"]))(
        variables["params"]
    )
    model.eval()(**MODELS["bert"][1])["loss"].backward()
    for name, g in grads.items():
        close(g, dict(model.named_parameters())[name].grad, name)


def test_other_lengths():
    """Rotary caches and causal masks are made for the length of each call."""
    model = llama().eval()
    apply, variables = from_module(model)
    for n in (6, 3, 8, 4):
        tokens = torch.arange(n)[None] % 12
        with torch.no_grad():
            expected = model(tokens, use_cache=False).logits
        close(apply(variables, to_jax(tokens), use_cache=False)["logits"], expected)


def test_vmap_and_per_example_gradients():
    model = vit(**MODELS["vit"][2], attn_implementation="eager")
    apply, variables = from_module(model)
    pixels = to_jax(MODELS["vit"][1]["pixel_values"])

    def loss(params, image):
        return score(apply({**variables, "params": params}, image[None]))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*row by row")
        grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(variables["params"], pixels)
    for k in range(2):
        inputs = {"pixel_values": MODELS["vit"][1]["pixel_values"][k : k + 1]}
        _, expected = torch_result(model, inputs, False)
        for name, g in grads.items():
            close(g[k], expected[name], name)
