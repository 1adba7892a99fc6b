"""What a model's signature asks for: text, an image, sound, a series."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .configs import IMAGE, PATCH, VOCABULARY, WIDTH, find

BATCH, LENGTH = 2, 8


def wave(*shape: int) -> torch.Tensor:
    size = 1
    for n in shape:
        size *= n
    return torch.sin(torch.arange(float(size)) * 0.7 + 0.3).reshape(shape)


def side(config: Any) -> int:
    size = find(config, "image_size", "img_size")
    size = size[0] if isinstance(size, list | tuple) else size
    size = size.get("height", IMAGE) if isinstance(size, dict) else size
    return size if isinstance(size, int) and size > 0 else 2 * IMAGE


def tokens(config: Any, length: int = LENGTH) -> torch.Tensor:
    vocabulary = find(config, "vocab_size") or VOCABULARY
    ids = 3 + torch.arange(BATCH * length).reshape(BATCH, length) * 5 % (min(vocabulary, 60) - 3)
    for name in ("bos_token_id",):
        value = find(config, name)
        if isinstance(value, int) and 0 <= value < vocabulary:
            ids[:, 0] = value
    eos = find(config, "eos_token_id")
    if isinstance(eos, int) and 0 <= eos < vocabulary:
        ids[:, -1] = eos
    return ids


def inputs_of(
    model: nn.Module, config: Any, images: int = 0, variant: int = 0, shape: int = 0
) -> dict[str, Any]:
    """What the signature asks for. `images` is the number of an image's tokens in the text."""
    names = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    required = {k for k, p in names.items() if p.default is p.empty and p.kind != p.VAR_KEYWORD}
    channels = find(config, "num_channels", "in_channels", "in_chans") or 3
    size = side(config)
    main = getattr(model, "main_input_name", "")
    if "input_ids" in names and variant != 2:
        ids = tokens(config, LENGTH + images)
        token = find(
            config,
            "image_token_id",
            "image_token_index",
            "audio_token_id",
            "audio_token_index",
            "video_token_id",
        )
        if images and isinstance(token, int):
            ids[:, 2 : 2 + images] = token
        if "mm_token_type_ids" in names:
            inputs["mm_token_type_ids"] = (ids == token).long() if images else torch.zeros_like(ids)
        inputs["input_ids"] = ids
        if "attention_mask" in names:
            mask = torch.ones_like(ids)
            if variant == 0:
                mask[1, -2:] = 0
            inputs["attention_mask"] = mask
    if "decoder_input_ids" in names and "CTC" not in type(model).__name__:
        inputs["decoder_input_ids"] = tokens(config, 5)
    if "pixel_values" in names and (variant != 1 or main == "pixel_values"):
        frames = find(config, "num_frames") or 4
        film = (BATCH, frames, channels, size, size)
        inputs["pixel_values"] = wave(*(film if shape else (BATCH, channels, size, size)))
    if "pixel_values_videos" in names and main == "pixel_values_videos":
        frames = find(config, "num_frames", "frames_per_clip") or 4
        inputs["pixel_values_videos"] = wave(BATCH, frames, channels, size, size)
    if "input_values" in names and "input_ids" not in inputs:
        bins = find(config, "num_mel_bins") or 16
        inputs["input_values"] = wave(
            *((BATCH, 1600), (BATCH, 1, 1600), (BATCH, find(config, "max_length") or 64, bins))[
                shape
            ]
        )
        if "padding_mask" in required:
            inputs["padding_mask"] = torch.ones(BATCH, 1600)
    if "input_features" in names and (variant != 1 or main == "input_features"):
        bins = (
            find(
                config,
                "num_mel_bins",
                "n_mels",
                "input_feat_per_channel",
                "feature_projection_input_dim",
                "input_channels",
            )
            or 80
        )
        width = (find(config, "max_source_positions") or 32) * 2
        inputs["input_features"] = wave(
            *((BATCH, 64, bins), (BATCH, bins, width), (BATCH, 1, 64, bins))[shape]
        )
        if "input_features_mask" in names:
            inputs["input_features_mask"] = torch.ones(
                BATCH, 64 if shape == 0 else width, dtype=torch.long
            )
    if "past_values" in names:
        length = find(config, "context_length") or 32
        lags = max(find(config, "lags_sequence") or [0])
        wide = find(config, "num_input_channels", "input_size") or 1
        inputs["past_values"] = (
            wave(BATCH, length + lags, wide) if wide > 1 else wave(BATCH, length + lags)
        )
        if "channels" in required or type(model).__module__.split(".")[-2] in (
            "patchtst",
            "patchtsmixer",
        ):
            inputs["past_values"] = wave(BATCH, length, wide)
        if "past_time_features" in names:
            inputs["past_time_features"] = wave(
                BATCH, length + lags, find(config, "num_time_features") or 1
            )
            inputs["past_observed_mask"] = torch.ones_like(inputs["past_values"])
            inputs["future_values"] = wave(BATCH, find(config, "prediction_length") or 4)
            inputs["future_time_features"] = wave(
                BATCH,
                find(config, "prediction_length") or 4,
                find(config, "num_time_features") or 1,
            )
    if "bbox" in names:
        corner = torch.arange(BATCH * LENGTH * 2).reshape(BATCH, LENGTH, 2) * 3 % 30
        inputs["bbox"] = torch.cat([corner, corner + 20], -1)
    if "grid_thw" in required or "image_grid_thw" in names:
        grid = torch.tensor([[1, 4, 4]] * BATCH)
        patch, frames = (
            find(config, "patch_size") or PATCH,
            find(config, "temporal_patch_size") or 1,
        )
        pixels = wave(BATCH * 16, channels * frames * patch * patch)
        if "grid_thw" in required:
            inputs |= {
                "hidden_states" if "hidden_states" in required else "pixel_values": pixels,
                "grid_thw": grid,
            }
        elif "pixel_values" in inputs:
            inputs |= {"pixel_values": pixels, "image_grid_thw": grid}
    elif "hidden_states" in required:
        inputs["hidden_states"] = wave(
            BATCH, LENGTH, find(config, "hidden_size", "d_model") or WIDTH
        )
    if "inputs_embeds" in required:
        inputs["inputs_embeds"] = wave(
            BATCH, LENGTH, find(config, "hidden_size", "d_model") or WIDTH
        )
    if (
        "labels" in names
        and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM"))
        and "input_ids" in inputs
    ):
        inputs["labels"] = inputs["input_ids"]
    return inputs


def counted(error: BaseException) -> int:
    """The number of an image's tokens that a model has asked for."""
    found = re.search(
        r"[Tt]okens?:? *(\d+),? .*features:? *\[?(?:torch.Size\(\[)?(\d+)",
        str(error).replace("\n", " "),
    )
    if not found:
        return 0
    tokens, features = int(found[1]), int(found[2])
    if tokens == features:  # it counted numbers, not tokens
        features //= WIDTH
    return -(-features // BATCH)


def attempts(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    names = inspect.signature(model.forward).parameters
    shapes = {"pixel_values", "input_values", "input_features"} & set(names)
    for variant in range(3):
        for shape in range(3 if shapes else 1):
            yield inputs_of(model, config, 0, variant, shape)
