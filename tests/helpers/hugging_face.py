"""Hugging Face's models from tiny configurations, with random weights, and whether they agree with torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torch2jax import from_module, tape_info, to_state_dict

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
