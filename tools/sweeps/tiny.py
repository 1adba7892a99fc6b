"""Models of transformers and timm, tiny and with random weights, and inputs that they take."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from . import named
from .configs import tiny_config
from .inputs import BATCH, attempts, counted, inputs_of, wave

LARGEST = 6_000_000
"""Parameters of a model that still counts as tiny."""


class Refused(Exception):
    """Why there is no tiny model of this name, or none that PyTorch runs."""


class Subject(NamedTuple):
    model: nn.Module
    inputs: dict[str, Any]


# Heads in the order in which one is chosen.
HEADS = (
    "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT",
    "OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "MASKED_LM",
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


def runs(model: nn.Module, inputs: dict[str, Any]) -> bool:
    out = copy.deepcopy(model)(**inputs)  # a cache of tensors in it would stop later copies
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
                    call = f"{class_name}({', '.join(inputs)})"
                    problems.append(f"{call}: {type(error).__name__}: {str(error)[:200]}")
                    images = counted(error)
                    if not images:
                        break
                    inputs = inputs_of(model, config, images)
    raise Refused(" | ".join(problems) or "no class of a model")


# timm: the smallest of each family, by the module that defines it.
def timm_names() -> list[str]:
    timm = with_torchvision("timm")
    chosen: dict[str, str] = {}
    sizes = (
        "atto",
        "pico",
        "femto",
        "nano",
        "xxs",
        "xxt",
        "xtiny",
        "tiny",
        "_t",
        "xs",
        "small",
        "_s",
        "_0",
        "18",
        "b0",
    )
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


def shortened(model: nn.Module, inputs: dict[str, Any]) -> nn.Module:
    """The model with at most two layers of a kind in a row, where it runs so."""

    def kind(layer: nn.Module) -> Any:
        return type(layer), [(k, p.shape) for k, p in layer.named_parameters()]

    short = copy.deepcopy(model)
    for path, group in reversed(list(short.named_modules())):  # the inner ones first
        if type(group) not in (nn.Sequential, nn.ModuleList) or len(group) < 3:
            continue
        layers = list(group)
        kinds = [kind(x) for x in layers]
        same = [i for i in range(2, len(layers)) if kinds[i - 2] == kinds[i - 1] == kinds[i]]
        if same and kinds[same[0]][1]:
            parent, _, name = path.rpartition(".")
            left = [x for i, x in enumerate(layers) if i not in same]
            made = nn.Sequential(*left) if type(group) is nn.Sequential else nn.ModuleList(left)
            owner = short.get_submodule(parent)
            if getattr(owner, name) is group:
                setattr(owner, name, made)
    try:
        copy.deepcopy(short)(**inputs)
    except Exception:
        return model
    return short


def timm_subject(name: str) -> Subject:
    timm = with_torchvision("timm")
    problems = []
    for size in (32, 64, 96, 128, 160, 224, 256):
        for options in ({"img_size": size}, {}):
            torch.manual_seed(0)
            try:
                model = timm.create_model(name, num_classes=7, **options).eval()
                inputs = {"x": wave(BATCH, 3, size, size)}
                model = shortened(model, inputs)
                wide = sum(p.numel() for p in model.parameters())
                if wide > 15 * LARGEST:
                    raise Refused(f"{wide} parameters")
                copy.deepcopy(model)(**inputs)  # a cache of tensors in it would stop later copies
                return Subject(model, inputs)
            except Refused:
                raise
            except Exception as error:
                problems.append(f"{size} {options}: {type(error).__name__}: {str(error)[:100]}")
    raise Refused(" | ".join(problems))


def subject(name: str) -> Subject:
    library, _, rest = name.partition("/")
    return timm_subject(rest) if library == "timm" else transformers_subject(rest)
