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
import pytest
import torch
from lowered_models import agrees, wave
from torch import nn

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
