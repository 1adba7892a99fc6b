"""Models whose tiny configuration or input the rules of `tiny` do not find."""

from __future__ import annotations

from typing import Any


def resnet() -> Any:
    import transformers

    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


def detr(**options: Any) -> Any:
    return lambda: {"backbone_config": resnet(), "num_queries": 6, **options}


def rt_detr() -> Any:
    import transformers

    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    return {
        "backbone_config": backbone, "encoder_in_channels": [8, 16, 16], "num_queries": 6,
        "encoder_hidden_dim": 32, "decoder_in_channels": [32, 32, 32], "d_model": 32,
        "num_denoising": 4,
    }  # fmt: skip


def masked(**options: Any) -> Any:
    import transformers

    backbone = transformers.SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], window_size=4,
        drop_path_rate=0.0, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return {"backbone_config": backbone, **options}


MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
MROPE_TEXT = {"text_config": {"rope_parameters": MROPE}}
SERIES = {
    "prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1,
}  # fmt: skip
# What a configuration has beside what the rules find: a dict, or a function that makes it.
FIXED: dict[str, Any] = {
    "detr": detr(),
    "conditional_detr": detr(),
    "dab-detr": detr(),
    "table-transformer": detr(),
    "deformable_detr": detr(num_feature_levels=4),
    "rt_detr": rt_detr,
    "rt_detr_v2": rt_detr,
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "mask2former": lambda: masked(num_attention_heads=4, num_queries=6),
    "gemma3": {"mm_tokens_per_image": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "qwen2_vl": {**MROPE_TEXT, "vision_config": {"hidden_size": 32}},
    "qwen2_vl_text": {"rope_parameters": MROPE},
    "qwen2_5_vl": {**MROPE_TEXT, "vision_config": {"out_hidden_size": 32}},
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    "glm4v": {**MROPE_TEXT, "vision_config": {"out_hidden_size": 32}},
    "glm4v_text": {"rope_parameters": MROPE},
    "reformer": {"is_decoder": True},
    "xlnet": {"d_head": 8},
    "bit": {"num_groups": 4},
    "time_series_transformer": SERIES,
    "autoformer": SERIES,
    "informer": SERIES,
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "codegen": {"rotary_dim": 4},
    "bridgetower": {"num_attention_heads": 4},
    "nemotron": {"num_key_value_heads": 4, "head_dim": 8},
    "emu3": {"pad_token_id": 0},
    "gemma4_text": {"vocab_size_per_layer_input": 99},
    "swin2sr": {"num_heads": [2, 2]},
}  # fmt: skip


def fixed(name: str) -> dict[str, Any]:
    value = FIXED.get(name, {})
    return value() if callable(value) else dict(value)


SUBJECTS: dict[str, Any] = {}
