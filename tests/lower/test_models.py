"""Whole models as JAX programs: values and all gradients are PyTorch's, without the bridge.

Tiny models of transformers with random weights: those that test_huggingface.py does not have, which
run in test_lower.py. In evaluation mode; with T2J_ALL_LOWERINGS=1 in training mode too.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_huggingface as hf
import torch
from torch import nn

from torch2jax import from_module, lowering_report

ALL = os.environ.get("T2J_ALL_LOWERINGS") == "1"
transformers = hf.transformers


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*reach it as int64.*")
        warnings.filterwarnings("ignore", module="transformers")
        yield


def resnet() -> Any:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def mamba() -> Any:
    config = transformers.MambaConfig(
        vocab_size=12, hidden_size=16, state_size=4, num_hidden_layers=2, use_cache=False,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.MambaForCausalLM(config)


def wav2vec2() -> Any:
    config = transformers.Wav2Vec2Config(
        vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0,
        final_dropout=0.0, layerdrop=0.0, apply_spec_augment=False, pad_token_id=0,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=20, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8,
        max_source_positions=16, max_target_positions=8, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, dropout=0.0, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def wave(*shape: int) -> torch.Tensor:
    return torch.sin(torch.arange(float(np.prod(shape))) * 0.7).reshape(shape)


LABELS = torch.tensor([[3, 4, 5], [5, 6, 7]])
HUGGING_FACE: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "resnet": (resnet, {"pixel_values": wave(2, 3, 16, 16), "labels": torch.tensor([1, 0])}),
    "mamba": (mamba, {"input_ids": hf.TOKENS, "labels": hf.TOKENS, "use_cache": False}),
    # Without labels: its loss drops the padding of the labels, a shape that depends on values.
    "wav2vec2": (wav2vec2, {"input_values": wave(2, 160)}),
    "whisper": (
        whisper,
        {"input_features": wave(2, 8, 32), "labels": LABELS, "use_cache": False},
    ),
}


def leaves(out: Any) -> list[Any]:
    """Float results, of PyTorch's model or of ours, in one order."""
    out = dict(out) if hasattr(out, "keys") else out
    found = jax.tree.leaves(out, is_leaf=lambda x: isinstance(x, torch.Tensor))
    return [
        x
        for x in found
        if (x.is_floating_point() if torch.is_tensor(x) else jnp.issubdtype(x.dtype, jnp.floating))
    ]


def score(out: Any) -> Any:
    return sum(((y * y * (1 + k / 2) + y).mean() for k, y in enumerate(leaves(out))), 0.0)


def close(actual: Any, expected: Any, where: str) -> None:
    # Deep convolution nets add up long sums in other orders: measured beside the largest value.
    expected = expected.detach().numpy()
    scale = max(float(np.abs(expected).max(initial=0)), 1e-3)
    off = np.abs(np.asarray(actual) - expected) / scale
    # A unit before a ReLU that is 0 but for rounding passes its gradient on in one of the two.
    assert np.sum(off > 2e-3) <= off.size // 100, f"{where}: {np.sum(off > 2e-3)} of {off.size}"
    assert off.max(initial=0) < 3e-2, f"{where}: {off.max()}"


def agrees(model: nn.Module, inputs: dict[str, Any], train: bool) -> None:
    twin = copy.deepcopy(model).train(train)
    expected = twin(**inputs)
    score(expected).backward()

    apply, variables = from_module(model, lower=True)
    arrays = {k: hf.to_jax(x) for k, x in inputs.items() if isinstance(x, torch.Tensor)}
    static = {k: x for k, x in inputs.items() if k not in arrays}

    def loss(params: Any, arrays: Any) -> Any:
        out = apply({**variables, "params": params}, train=train, **arrays, **static)
        out, buffers = out if train else (out, {})
        return score(out), (out, buffers)

    step = jax.jit(jax.grad(loss, has_aux=True))
    assert "custom_call" not in jax.jit(loss).lower(variables["params"], arrays).as_text()
    grads, (out, buffers) = step(variables["params"], arrays)
    for k, (y, want) in enumerate(zip(leaves(out), leaves(expected), strict=True)):
        close(y, want, f"result {k}")
    wanted = {k: p for k, p in twin.named_parameters() if p.requires_grad}
    assert set(grads) == set(wanted)
    top = max(float(p.grad.abs().max()) for p in wanted.values() if p.grad is not None)
    for name, p in wanted.items():
        want = torch.zeros_like(p) if p.grad is None else p.grad
        if want.abs().max() > 1e-5 * top:  # else it is rounding: a bias before a batch norm
            close(grads[name], want, name)
        else:
            assert float(jnp.abs(grads[name]).max()) <= 1e-4 * top, name
    for name, b in twin.named_buffers():
        if name in buffers:
            close(buffers[name], b, name)
    report = lowering_report(apply, variables, train=train, **arrays, **static)
    assert report.native
    assert not report.bridge


@pytest.mark.parametrize("train", [False, True] if ALL else [False])
@pytest.mark.parametrize("name", list(HUGGING_FACE))
def test_hugging_face(name: str, train: bool) -> None:
    make, inputs = HUGGING_FACE[name]
    agrees(make(), inputs, train)


def test_padded_batch_of_an_encoder() -> None:
    """In evaluation mode PyTorch would make a nested tensor of it, without derivatives."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    agrees(encoder, {"src": wave(2, 5, 8), "src_key_padding_mask": mask}, False)
