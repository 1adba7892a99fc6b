"""Models of transformers and timm, tiny and with random weights, and inputs that they take."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

LARGEST = 6_000_000
"""Parameters of a model that still counts as tiny."""
BATCH, LENGTH, VOCABULARY, WIDTH, IMAGE, PATCH = 2, 8, 99, 32, 32, 8


class Refused(Exception):
    """Why there is no tiny model of this name, or none that PyTorch runs."""


class Subject(NamedTuple):
    model: nn.Module
    inputs: dict[str, Any]


# What a number of a configuration becomes, by its name; the first pattern that matches counts.
# Values are a number, or a function of the number that stands there.
RULES: tuple[tuple[str, Any], ...] = (
    (r"(num_)?(q|o|query|output)_lora_rank|kv_lora_rank|lora_rank", 16),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|index_head_dim", 8),
    (r"linear_(key|value)_head_dim|mamba_d_head|mamba_head_dim|(qk_|kq_)?head_dim|kv_channels|"
     r"attention_head_dim|d_kv|attention_head_size|global_head_dim", 8),
    (r"(linear_num|num|n|mamba_n)_(key|value)_heads|mamba_n(um)?_heads", 4),
    (r".*(key_value_heads|kv_heads|query_groups|kv_head)|n_groups|num_kv.*", lambda n: min(n, 2)),
    (r"(.*_)?(n|num).*_heads?|.*attention_heads|.*_heads|n_head", lambda n: min(n, 4)),
    (r"n_group|topk_group|moe_layer_start_index|first_k_dense_replace|mlp_only_layers", lambda n: min(n, 1)),
    (r".*(num|n).*experts_per_tok.*|.*top_?k(_experts)?|num_selected_experts|moe_k|expert_capacity", lambda n: min(n, 2)),
    (r".*(num|n)_.*experts|.*num_experts", lambda n: min(n, 4)),
    (r".*shared_expert_intermediate_size|.*moe_intermediate_size|moe_.*_size", 24),
    (r"vocab_size|.*_vocab_size.*|.*vocab_size", lambda n: min(n, VOCABULARY)),
    (r"(num_|n_)?(hidden_)?layers?|depth|.*_layers|n_layer|num_blocks|.*num_layers|encoder_depth|"
     r"num_block_repeats|decoder_depth|.*_depth|num_stacks|.*_blocks", lambda n: min(n, 2)),
    (r"max_(position|source|target).*|.*positions|n_positions|n_ctx|max_seq(uence)?_len.*|"
     r"sliding_window|attention_window_size|window_size_.*|max_.*_length|context_length", lambda n: min(n, 64)),
    (r".*intermediate_size|.*ffn_dim.*|d_ff|n_inner|.*ff_dim|dim_feedforward|.*mlp_dim|mlp_hidden.*|"
     r".*ffn_hidden_size|feed_forward_.*size|ffn_.*|inner_dim", lambda n: min(n, 48)),
    (r".*image_size.*|.*img_size|input_size", lambda n: min(n, IMAGE)),
    (r"patch_size|.*_patch_size", lambda n: min(n, PATCH)),
    (r"num_frames|.*tubelet_size", lambda n: min(n, 4)),
    (r"state_size|mamba_d_state|ssm_state_size|mamba_state_dim", lambda n: min(n, 8)),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"mamba_chunk_size|chunk_size", lambda n: min(n, 8)),
    (r"num_queries|num_query_tokens|num_latents|num_object_queries|.*num_queries", lambda n: min(n, 10)),
    (r".*hidden_size.*|.*d_model|n_embd|dim|.*embed(ding)?_(dim|size).*|.*hidden_dim.*|.*_dim|d_.*|"
     r".*width|.*embedding_size|.*_channels?|hidden_channels|.*_size|.*_features", lambda n: WIDTH if n > WIDTH else n),
)  # fmt: skip
KEPT = re.compile(
    r"num_channels|in_channels|.*_id|.*_index|.*token.*|.*kernel.*|.*stride.*|.*_ratio|num_labels|"
    r".*sampling_rate|.*num_mel_bins|.*_std|.*range.*|.*conv_dim$|label.*|out_indices|bias.*|"
    r".*num_buckets|.*max_distance|conv_bias|num_conv_pos.*|use_.*|image_seq_length|merge_size|"
    r"spatial_merge.*|temporal_patch_size|frequency_.*|time_stride|axial_.*|num_hash.*|lsh_.*|local_.*"
)
LISTS = re.compile(r".*(hidden_sizes|dims?|channels|embed_dims|layer_dims|widths|sizes|conv_dim)$")
DEPTHS = re.compile(r".*(depths|num_layers|layers_per_stage|num_blocks|layers|repeats|num_block_repeats|num_encoder_blocks)$")


def number(name: str, value: int) -> int:
    if re.fullmatch(r".*(_token_id|_token_index|token)", name):
        return value if value < VOCABULARY - 20 else VOCABULARY - 1 - value % 19
    if KEPT.fullmatch(name):
        return value
    for pattern, becomes in RULES:
        if re.fullmatch(pattern, name):
            return becomes(value) if callable(becomes) else (becomes if value > 0 else value)
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


def is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


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
    same = getattr(default, "num_key_value_heads", 0) == getattr(default, "num_attention_heads", None)
    if heads and same and "num_key_value_heads" in changes:
        changes["num_key_value_heads"] = heads
    layers = next((changes[n] for n in LAYERS if n in changes), None)
    for name, value in vars(default).items():
        kinds = value if isinstance(value, list) and name in accepted else []
        if layers and kinds and re.search("layer|block|pattern", name) and all(isinstance(v, str) for v in kinds):
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
        elif isinstance(value, float) and re.search(r"drop(out|path|_)|_pdrop|layerdrop|drop_rate", name):
            setattr(config, name, 0.0)
        elif name == "use_cache":
            config.use_cache = False
        elif name in ("apply_spec_augment", "use_pretrained_backbone", "use_timm_backbone"):
            setattr(config, name, False)
    return config


# Heads in the order in which one is chosen.
HEADS = (
    "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "OBJECT_DETECTION",
    "ZERO_SHOT_OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "MASKED_LM",
    "CTC", "AUDIO_CLASSIFICATION", "TOKEN_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION", "VISUAL_QUESTION_ANSWERING", "IMAGE_TO_IMAGE",
    "TIME_SERIES_PREDICTION", "KEYPOINT_DETECTION", "BACKBONE", "",
)  # fmt: skip


def classes(name: str) -> Iterator[Any]:
    from transformers.models.auto import modeling_auto as auto

    seen = set()
    for head in HEADS:
        table = getattr(auto, f"MODEL_FOR_{head}_MAPPING_NAMES" if head else "MODEL_MAPPING_NAMES")
        found = table.get(name, ())
        for cls in (found,) if isinstance(found, str) else found:
            if cls not in seen:
                seen.add(cls)
                yield cls


def architectures() -> list[str]:
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return [n for n in CONFIG_MAPPING if n in auto.MODEL_MAPPING_NAMES]


def wave(*shape: int) -> torch.Tensor:
    size = 1
    for n in shape:
        size *= n
    return torch.sin(torch.arange(float(size)) * 0.7 + 0.3).reshape(shape)


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


def inputs_of(model: nn.Module, config: Any, images: int = 0, variant: int = 0, shape: int = 0) -> dict[str, Any]:
    """What the signature asks for: text, an image, sound, a series. `images` are the tokens of an image."""
    names = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    required = {k for k, p in names.items() if p.default is p.empty and p.kind != p.VAR_KEYWORD}
    channels = find(config, "num_channels", "in_channels", "in_chans") or 3
    size = side(config)
    main = getattr(model, "main_input_name", "")
    if "input_ids" in names and variant != 2:
        ids = tokens(config, LENGTH + images)
        token = find(config, "image_token_id", "image_token_index", "audio_token_id", "audio_token_index", "video_token_id")
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
        inputs["input_values"] = wave(*((BATCH, 1600), (BATCH, 1, 1600), (BATCH, find(config, "max_length") or 64, bins))[shape])
        if "padding_mask" in required:
            inputs["padding_mask"] = torch.ones(BATCH, 1600)
    if "input_features" in names and (variant != 1 or main == "input_features"):
        bins = find(config, "num_mel_bins", "n_mels", "input_feat_per_channel", "feature_projection_input_dim", "input_channels") or 80
        width = (find(config, "max_source_positions") or 32) * 2
        inputs["input_features"] = wave(*((BATCH, 64, bins), (BATCH, bins, width), (BATCH, 1, 64, bins))[shape])
        if "input_features_mask" in names:
            inputs["input_features_mask"] = torch.ones(BATCH, 64 if shape == 0 else width, dtype=torch.long)
    if "past_values" in names:
        length = find(config, "context_length") or 32
        lags = max(find(config, "lags_sequence") or [0])
        wide = find(config, "num_input_channels", "input_size") or 1
        inputs["past_values"] = wave(BATCH, length + lags, wide) if wide > 1 else wave(BATCH, length + lags)
        if "channels" in required or type(model).__module__.split(".")[-2] in ("patchtst", "patchtsmixer"):
            inputs["past_values"] = wave(BATCH, length, wide)
        if "past_time_features" in names:
            inputs["past_time_features"] = wave(BATCH, length + lags, find(config, "num_time_features") or 1)
            inputs["past_observed_mask"] = torch.ones_like(inputs["past_values"])
            inputs["future_values"] = wave(BATCH, find(config, "prediction_length") or 4)
            inputs["future_time_features"] = wave(BATCH, find(config, "prediction_length") or 4, find(config, "num_time_features") or 1)
    if "bbox" in names:
        corner = torch.arange(BATCH * LENGTH * 2).reshape(BATCH, LENGTH, 2) * 3 % 30
        inputs["bbox"] = torch.cat([corner, corner + 20], -1)
    if "grid_thw" in required or "image_grid_thw" in names:
        grid = torch.tensor([[1, 4, 4]] * BATCH)
        patch, frames = find(config, "patch_size") or PATCH, find(config, "temporal_patch_size") or 1
        pixels = wave(BATCH * 16, channels * frames * patch * patch)
        if "grid_thw" in required:
            inputs |= {"hidden_states" if "hidden_states" in required else "pixel_values": pixels, "grid_thw": grid}
        elif "pixel_values" in inputs:
            inputs |= {"pixel_values": pixels, "image_grid_thw": grid}
    elif "hidden_states" in required:
        inputs["hidden_states"] = wave(BATCH, LENGTH, find(config, "hidden_size", "d_model") or WIDTH)
    if "inputs_embeds" in required:
        inputs["inputs_embeds"] = wave(BATCH, LENGTH, find(config, "hidden_size", "d_model") or WIDTH)
    if "labels" in names and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")) and "input_ids" in inputs:
        inputs["labels"] = inputs["input_ids"]
    return inputs


def weigh(model: nn.Module) -> None:
    """Weights that leave no branch at zero, the same at each call."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p.dtype))


def build(cls: Any, config: Any) -> nn.Module:
    from transformers import initialization

    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in cls(config).parameters())
        except (NotImplementedError, RuntimeError):
            size = 0
    if size > LARGEST:
        raise Refused(f"{cls.__name__} has {size} parameters")
    torch.manual_seed(0)
    del initialization
    model = cls(config).eval().float()
    size = sum(p.numel() for p in model.parameters())
    if size > LARGEST:
        raise Refused(f"{cls.__name__} has {size} parameters")
    weigh(model)
    return model


def counted(error: BaseException) -> int:
    """The number of an image's tokens that a model has asked for."""
    found = re.search(r"[Tt]okens?:? *(\d+),? .*features:? *\[?(?:torch.Size\(\[)?(\d+)", str(error).replace("\n", " "))
    if not found:
        return 0
    n = int(found[2])
    return -(-n // BATCH)


def attempts(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    names = inspect.signature(model.forward).parameters
    shapes = {"pixel_values", "input_values", "input_features"} & set(names)
    for variant in range(3):
        for shape in range(3 if shapes else 1):
            yield inputs_of(model, config, 0, variant, shape)


def runs(model: nn.Module, inputs: dict[str, Any]) -> bool:
    out = model(**inputs)
    return any(t.is_floating_point() and t.requires_grad for t in tensors(out))


def tensors(out: Any) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, dict):
        return [t for k in sorted(out) for t in tensors(out[k])]
    if isinstance(out, list | tuple):
        return [t for o in out for t in tensors(o)]
    return []


def transformers_subject(name: str) -> Subject:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from . import named

    if name in named.SUBJECTS:
        return Subject(*named.SUBJECTS[name]())
    problems = []
    config_class = CONFIG_MAPPING[name]
    for class_name in classes(name):
        try:
            cls = getattr(transformers, class_name)
            config = tiny_config(config_class, **named.fixed(name))
            model = build(cls, config)
        except Exception as error:
            problems.append(f"{class_name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        for inputs in attempts(model, config):
            for _ in range(3):
                try:
                    if inputs and runs(model, inputs):
                        return Subject(model, inputs)
                    problems.append(f"{class_name}: no gradient")
                    break
                except Exception as error:
                    problems.append(f"{class_name}({', '.join(inputs)}): {type(error).__name__}: {str(error)[:200]}")
                    images = counted(error)
                    if not images:
                        break
                    inputs = inputs_of(model, config, images)
    raise Refused(" | ".join(problems) or "no class of a model")


# timm: the smallest of each family, by the module that defines it.
def timm_names() -> list[str]:
    timm = with_torchvision("timm")
    chosen: dict[str, str] = {}
    sizes = ("atto", "pico", "femto", "nano", "xxs", "xxt", "xtiny", "tiny", "_t", "xs", "small", "_s", "_0", "18", "b0")
    for name in timm.list_models():
        module = timm.models._registry._model_to_module[name]
        rank = next((i for i, s in enumerate(sizes) if s in name), len(sizes))
        best = chosen.get(module)
        if best is None or (rank, len(name)) < best[:2]:
            chosen[module] = (rank, len(name), name)
    return sorted(n for *_, n in chosen.values())


def with_torchvision(name: str) -> Any:
    """A package that imports torchvision, whose compiled operators need not load."""
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for loaded in [n for n in sys.modules if n.split(".")[0] in ("torchvision", name)]:
        del sys.modules[loaded]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
    return importlib.import_module(name)


_kept: list[Any] = []


def timm_subject(name: str) -> Subject:
    timm = with_torchvision("timm")
    problems = []
    for size in (32, 64, 96, 128, 160, 224, 256):
        for options in ({"img_size": size}, {}):
            torch.manual_seed(0)
            try:
                model = timm.create_model(name, num_classes=7, **options).eval()
                wide = sum(p.numel() for p in model.parameters())
                if wide > 5 * LARGEST:
                    raise Refused(f"{wide} parameters")
                inputs = {"x": wave(BATCH, 3, size, size)}
                model(**inputs)
                return Subject(model, inputs)
            except Refused:
                raise
            except Exception as error:
                problems.append(f"{size} {options}: {type(error).__name__}: {str(error)[:100]}")
    raise Refused(" | ".join(problems))


def subject(name: str) -> Subject:
    library, _, rest = name.partition("/")
    return timm_subject(rest) if library == "timm" else transformers_subject(rest)
