"""Whole models as JAX programs: values and all gradients are PyTorch's, without the bridge.

Tiny models of transformers with random weights: those that bridge/test_huggingface.py does not
have, which run in test_functions.py. In evaluation mode; with T2J_ALL_LOWERINGS=1 in training mode
too.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hugging_face as hf
import jax
import pytest
import torch
from lowered_models import agrees, close, wave
from torch import nn

from torch2jax import from_module

pytestmark = pytest.mark.optimized

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


def longformer() -> Any:
    config = transformers.LongformerConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, attention_window=4, max_position_embeddings=32, pad_token_id=1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.LongformerForMaskedLM(config)


def led() -> Any:
    config = transformers.LEDConfig(
        vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, attention_window=4,
        max_encoder_position_embeddings=32, max_decoder_position_embeddings=32, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, use_cache=False, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    return transformers.LEDForConditionalGeneration(config)


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "rope_parameters": rope,
        "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2,
        "patch_size": 2, "temporal_patch_size": 2, "in_channels": 3, "spatial_merge_size": 2,
    }  # fmt: skip
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=39, video_token_id=38,
        vision_start_token_id=37, vision_end_token_id=36,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


LONG = 3 + torch.arange(24).reshape(2, 12) * 5 % 17
LONG_MASK = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
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


IMAGE_TEXT = torch.tensor([[5, 37, 39, 39, 39, 39, 36, 6]])
# They ask for values: where attention is global, and into how many patches an image was cut.
ASKING: dict[str, tuple[Callable[[], Any], dict[str, torch.Tensor]]] = {
    "longformer": (
        longformer,
        {
            "input_ids": LONG,
            "attention_mask": LONG_MASK,
            "global_attention_mask": torch.eye(2, 12, dtype=torch.long),
        },
    ),
    "led": (led, {"input_ids": LONG, "attention_mask": LONG_MASK, "labels": LABELS}),
    "qwen2_vl": (
        qwen2_vl,
        {
            "input_ids": IMAGE_TEXT,
            "attention_mask": torch.ones_like(IMAGE_TEXT),
            "mm_token_type_ids": (IMAGE_TEXT == 39).long(),
            "pixel_values": wave(16, 24),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        },
    ),
}


@pytest.mark.parametrize("name", list(ASKING))
def test_models_that_ask_for_values(name: str) -> None:
    make, inputs = ASKING[name]
    model = make().eval()
    expected = model(**inputs).logits
    expected.square().mean().backward()
    apply, variables = from_module(model, lower=True)

    def loss(params: Any, arrays: Any) -> Any:
        out = apply({**variables, "params": params}, **arrays)["logits"]
        return (out * out).mean(), out

    step = jax.grad(loss, has_aux=True)
    arrays = {k: hf.to_jax(x) for k, x in inputs.items()}
    wanted = {
        k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()
    }
    top = max(float(g.abs().max()) for g in wanted.values())
    for run in (step, jax.jit(step)):
        grads, out = run(variables["params"], arrays)
        close(out, expected, "logits")
        for k, g in wanted.items():
            if g.abs().max() > 1e-5 * top:  # else it is rounding: the bias of keys
                close(grads[k], g, k)
            else:
                assert float(abs(grads[k]).max()) <= 1e-4 * top, k
