"""Hugging Face's models with random weights: values and all gradients are torch's own.

Nothing is downloaded: each model is made from a tiny configuration.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hugging_face import (
    MASK,
    MODELS,
    TEXT,
    TOKENS,
    agrees,
    bert,
    close,
    gpt2,
    llama,
    score,
    to_jax,
    torch_result,
    vit,
)

from torch2jax import SignatureError, Torch2JaxWarning, clear_tape, from_module, to_state_dict

pytestmark = pytest.mark.optimized


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
    model = make()
    apply, variables = from_module(model)
    arrays = {k: to_jax(x) for k, x in inputs.items() if isinstance(x, torch.Tensor)}
    # transformers 5.24 calls it "cache", and called it "past_key_values" before.
    own = model(**{**inputs, "use_cache": True})
    (key,) = [k for k, x in own.items() if type(x).__name__.endswith("Cache")]
    with pytest.raises(SignatureError, match=rf"\['{key}'\]: \w*Cache; .*use_cache=False"):
        apply(variables, **arrays, use_cache=True)
    out = apply(variables, **arrays, use_cache=False)
    assert key not in out


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
