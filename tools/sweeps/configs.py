"""Configurations of transformers with small sizes, found by the names of their numbers."""

from __future__ import annotations

import inspect
import re
from typing import Any

VOCABULARY, WIDTH, IMAGE, PATCH = 99, 32, 32, 8

# What a number of a configuration becomes, by its name; the first pattern that matches counts.
# The number stays where it is smaller, but where it is "as" given.
RULES: tuple[tuple[tuple[str, ...], str, int], ...] = (
    (("(num_)?(q|o|query|output)_lora_rank", "kv_lora_rank", "lora_rank"), "as", 16),
    (("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), "as", 8),
    (
        ("linear_(key|value)_head_dim", "mamba_d_head", "mamba_head_dim", "(qk_|kq_)?head_dim"),
        "as",
        8,
    ),
    (("kv_channels", "attention_head_dim", "d_kv", "attention_head_size"), "as", 8),
    (("global_head_dim",), "as", 8),
    (("(linear_num|num|n|mamba_n)_(key|value)_heads", "mamba_n(um)?_heads"), "as", 4),
    ((".*(key_value_heads|kv_heads|query_groups|kv_head)", "n_groups", "num_kv.*"), "most", 2),
    (("(.*_)?(n|num).*_heads?", ".*attention_heads", ".*_heads", "n_head"), "most", 4),
    (("n_group", "topk_group", "moe_layer_start_index", "first_k_dense_replace"), "most", 1),
    ((".*(num|n).*experts_per_tok.*", ".*top_?k(_experts)?", "num_selected_experts"), "most", 2),
    (("moe_k", "expert_capacity"), "most", 2),
    ((".*(num|n)_.*experts", ".*num_experts"), "most", 4),
    ((".*moe_intermediate_size", ".*shared_expert_intermediate_size", "moe_.*_size"), "as", 24),
    (("vocab_size", ".*_vocab_size.*", ".*vocab_size"), "most", VOCABULARY),
    (("(num_|n_)?(hidden_)?layers?", "depth", ".*_layers", "n_layer", "num_blocks"), "most", 2),
    ((".*num_layers", ".*_depth", "num_block_repeats", "num_stacks", ".*_blocks"), "most", 2),
    (("max_(position|source|target).*", ".*positions", "n_positions", "n_ctx"), "most", 64),
    (("max_seq(uence)?_len.*", "max_.*_length", "context_length"), "most", 64),
    (("sliding_window", "attention_window_size", "window_size_.*"), "most", 64),
    ((".*intermediate_size", ".*ffn_dim.*", "d_ff", "n_inner", ".*ff_dim"), "most", 48),
    (("dim_feedforward", ".*mlp_dim", "mlp_hidden.*", ".*ffn_hidden_size"), "most", 48),
    (("feed_forward_.*size", "ffn_.*", "inner_dim"), "most", 48),
    ((".*image_size.*", ".*img_size", "input_size"), "most", IMAGE),
    (("patch_size", ".*_patch_size"), "most", PATCH),
    (("num_frames", ".*tubelet_size"), "most", 4),
    (("state_size", "mamba_d_state", "ssm_state_size", "mamba_state_dim"), "most", 8),
    (("time_step_rank", "mamba_dt_rank"), "as", 4),
    (("mamba_chunk_size", "chunk_size"), "most", 8),
    ((".*num_queries", "num_query_tokens", "num_latents", "num_object_queries"), "most", 10),
    (
        (".*hidden_size.*", ".*d_model", "n_embd", "dim", ".*embed(ding)?_(dim|size).*"),
        "most",
        WIDTH,
    ),
    ((".*hidden_dim.*", ".*_dim", "d_.*", ".*width", ".*_channels?"), "most", WIDTH),
    ((".*_size", ".*_features"), "most", WIDTH),
)


KEPT = re.compile(
    r"num_channels|in_channels|.*_id|.*_index|.*token.*|.*kernel.*|.*stride.*|.*_ratio|num_labels|"
    r".*sampling_rate|.*num_mel_bins|.*_std|.*range.*|.*conv_dim$|label.*|out_indices|bias.*|"
    r".*num_buckets|.*max_distance|conv_bias|num_conv_pos.*|use_.*|image_seq_length|merge_size|"
    r"spatial_merge.*|temporal_patch_size|frequency_.*|time_stride|axial_.*|num_hash.*|lsh_.*|local_.*"
)

LISTS = re.compile(r".*(hidden_sizes|dims?|channels|embed_dims|layer_dims|widths|sizes|conv_dim)$")

DEPTHS = re.compile(
    r".*(depths|num_layers|layers_per_stage|num_blocks|layers|repeats|num_block_repeats|num_encoder_blocks)$"
)

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def number(name: str, value: int) -> int:
    if re.fullmatch(r".*(_token_id|_token_index|token)", name):
        return value if value < VOCABULARY - 20 else VOCABULARY - 1 - value % 19
    if KEPT.fullmatch(name):
        return value
    for patterns, how, least in RULES:
        if any(re.fullmatch(p, name) for p in patterns):
            return least if how == "as" and value > 0 else min(value, least)
    return value


def numbers(name: str, values: Any) -> Any:
    if not values or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        return values
    if name.endswith("image_size") or name in ("image_size", "img_size", "input_size"):
        return type(values)(IMAGE for _ in values)
    if "patch" in name and "grid" not in name:
        return type(values)(min(v, PATCH) for v in values)
    if name.endswith(("heads", "num_head")):
        return type(values)(min(v, 2) for v in values)
    if DEPTHS.fullmatch(name):
        return type(values)(min(v, 1) for v in values)
    if LISTS.fullmatch(name) and max(values) > WIDTH:
        least = min(v for v in values if v > 0)
        return type(values)(min(16 * max(v // least, 1), 64) if v > 0 else v for v in values)
    return values


def tiny_config(cls: Any, **fixed: Any) -> Any:
    """A configuration with small sizes, whose derived values its own constructor finds.

    Of `fixed`, a dict beside the name of a configuration within holds what is fixed in that one.
    """
    default = cls()
    fields = set(getattr(cls, "__dataclass_fields__", ()))
    accepted = set(inspect.signature(cls.__init__).parameters) | fields
    changes: dict[str, Any] = {}
    for name, value in vars(default).items():
        name = name.lstrip("_") if name.lstrip("_") in accepted else name
        if is_config(value):
            within = fixed.pop(name) if isinstance(fixed.get(name), dict) else {}
            changes[name] = fixed[name] if name in fixed else tiny_config(type(value), **within)
        elif isinstance(value, bool) or name not in accepted:
            continue
        elif isinstance(value, int):
            small = number(name, value)
            if small != value:
                changes[name] = small
        elif isinstance(value, list | tuple):
            small = numbers(name, value)
            if small != value:
                changes[name] = small
    heads = changes.get("num_attention_heads")
    same = getattr(default, "num_key_value_heads", 0) == getattr(
        default, "num_attention_heads", None
    )
    if heads and same and "num_key_value_heads" in changes:
        changes["num_key_value_heads"] = heads
    layers = next((changes[n] for n in LAYERS if n in changes), None)
    for name, value in vars(default).items():
        kinds = value if isinstance(value, list) and name in accepted else []
        if (
            layers
            and kinds
            and re.search("layer|block|pattern", name)
            and all(isinstance(v, str) for v in kinds)
        ):
            kinds = list(dict.fromkeys(kinds))
            layers = max(layers, len(kinds))
            changes |= {n: layers for n in LAYERS if n in changes}
            changes[name] = (kinds * layers)[:layers]
    return quiet(cls(**{**changes, **fixed}))


def quiet(config: Any) -> Any:
    """Without dropout and caches."""
    for name, value in list(vars(config).items()):
        if is_config(value):
            quiet(value)
        elif isinstance(value, float) and re.search(
            r"drop(out|path|_)|_pdrop|layerdrop|drop_rate", name
        ):
            setattr(config, name, 0.0)
        elif name == "use_cache":
            config.use_cache = False
        elif name in ("apply_spec_augment", "use_pretrained_backbone", "use_timm_backbone"):
            setattr(config, name, False)
    return config


def find(config: Any, *names: str) -> Any:
    """The first of these values that a configuration or one within it has."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    for value in vars(config).values():
        if is_config(value):
            found = find(value, *names)
            if found is not None:
                return found
    return None
