"""torchvision's models as JAX programs: values and all gradients are PyTorch's, without the bridge.

Weights are random, images small. torchvision is no dependency, because its wheels pin one PyTorch:
`make test-ops` puts the one that belongs to this repository's into a folder of its own. Three models;
all with T2J_ALL_LOWERINGS=1. Its operators for detection are compared with a loop of their own.
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import precision
from lowered_models import agrees, wave
from torch import nn

from torch2jax import device, lowering_report, torch2jax
from torch2jax.lowerings.registry import DataDependentShape

ALL = os.environ.get("T2J_ALL_LOWERINGS") == "1"


def torchvision() -> Any:
    """torchvision; where its compiled operators cannot be loaded, the models without them.

    Wheels for CUDA do not load their extension beside a PyTorch for the CPU, and need the names of
    two operators to be imported.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
        import torchvision
    except ImportError:
        pytest.skip("torchvision is not there: make test-ops puts it where it is found")
    return torchvision.models


_kept: list[Any] = []


class Detector(nn.Module):
    """A detector up to its scores and boxes; how many of these it keeps depends on values."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.head = model.head if hasattr(model, "head") else model.rpn.head

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


CLASSIFIERS = [
    "resnet18", "mobilenet_v3_small", "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0",
    "googlenet", "inception_v3", "mnasnet0_5", "mobilenet_v2", "regnet_x_400mf",
    "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vgg11",
]  # fmt: skip
SEGMENTERS = ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50"]
DETECTORS = [
    "fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large",
    "retinanet_resnet50_fpn", "fcos_resnet50_fpn",
]  # fmt: skip
VISION = [*CLASSIFIERS, *SEGMENTERS, *DETECTORS]
# Rounding alone, in one of the two, is more than the bounds of float32 for these: a path through
# fifty layers, with a normalization of few values in each.
ROUNDED = ["fcos_resnet50_fpn"]
FEW = ["resnet18", "lraspp_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"]


@pytest.mark.parametrize("name", VISION if ALL else FEW)
def test_torchvision(name: str) -> None:
    options: dict[str, Any] = {"weights": None, "num_classes": 3}
    if name not in CLASSIFIERS:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options.update(aux_logits=False, init_weights=False)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision().get_model(name, **options)
    if name in DETECTORS:
        model = Detector(model)
    size = 96 if name == "inception_v3" else 64
    x, exact = wave(2, 3, size, size), name in ROUNDED
    if exact:
        model, x = model.double(), x.double()
    # Sequential, because the name of the argument differs.
    with precision(exact):
        agrees(nn.Sequential(model), {"input": x}, False)


# --- operators of torchvision --------------------------------------------------------------------

SCHEMAS = (
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height,"
    " SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
    "_roi_align_backward(Tensor grad, Tensor rois, float spatial_scale, SymInt pooled_height,"
    " SymInt pooled_width, SymInt batch_size, SymInt channels, SymInt height, SymInt width,"
    " int sampling_ratio, bool aligned) -> Tensor",
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@pytest.fixture
def operators() -> Iterator[Any]:
    """``torch.ops.torchvision``; where torchvision is not there, with its schemas alone."""
    with torch.library._scoped_library("torchvision", "FRAGMENT") as library:
        for schema in SCHEMAS:
            if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
                library.define(schema)
        device.enable()
        yield torch.ops.torchvision


def pooled(
    image: Any, rois: Any, scale: float, bins: tuple[int, int], ratio: int, aligned: bool
) -> Any:
    """One sample after the other."""
    height, width = image.shape[2:]
    out = np.zeros((len(rois), image.shape[1], *bins))
    for k, (index, *box) in enumerate(rois):
        x1, y1, x2, y2 = (float(b) * scale - 0.5 * aligned for b in box)
        h, w = y2 - y1, x2 - x1
        if not aligned:
            h, w = max(h, 1.0), max(w, 1.0)
        h, w = h / bins[0], w / bins[1]
        down, across = (ratio, ratio) if ratio > 0 else (int(np.ceil(h)), int(np.ceil(w)))
        for p, q, i, j in itertools.product(*map(range, (*bins, down, across))):
            y, x = y1 + (p + (i + 0.5) / down) * h, x1 + (q + (j + 0.5) / across) * w
            if -1 <= y <= height and -1 <= x <= width:
                y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                top, left = min(int(y), height - 2), min(int(x), width - 2)
                a, b = y - top, x - left
                four = image[int(index), :, top : top + 2, left : left + 2]
                out[k, :, p, q] += (1 - a) * ((1 - b) * four[:, 0, 0] + b * four[:, 0, 1])
                out[k, :, p, q] += a * ((1 - b) * four[:, 1, 0] + b * four[:, 1, 1])
        out[k] /= max(down * across, 1)
    return out


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [-1, 2])
def test_roi_align(operators: Any, ratio: int, aligned: bool) -> None:
    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, 3, 6, 7), np.float32)
    corners = np.sort(rng.uniform(-2, 12, (8, 2, 2)), 1).reshape(8, 4)
    rois = np.concatenate([rng.integers(0, 2, (8, 1)), corners], 1).astype(np.float32)
    rois[0, 1:], rois[1, 1:] = (0, 0, 60, 40), (3, 3, 3, 3)  # beyond the image, and empty
    scale, bins = 0.5, (3, 2)
    expected = pooled(image.astype(float), rois.astype(float), scale, bins, ratio, aligned)

    def fn(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return operators.roi_align(x, r, scale, *bins, ratio, aligned)

    there = fn(torch.tensor(image, device="jax"), torch.tensor(rois, device="jax"))
    np.testing.assert_allclose(there.cpu(), expected, 1e-4, 1e-5)
    half = fn(*(torch.tensor(a, device="jax").bfloat16() for a in (image, rois)))
    assert half.dtype is torch.bfloat16
    lowered = torch2jax(fn, lower=True)
    report = lowering_report(fn, jnp.asarray(image), jnp.asarray(rois))
    assert report.native
    assert not report.bridge
    np.testing.assert_allclose(jax.jit(lowered)(image, rois), expected, 1e-4, 1e-5)

    # It is linear in the image: its gradient gives the same products.
    weights = rng.standard_normal(expected.shape, np.float32)
    by_image, by_rois = jax.jit(
        jax.grad(lambda x, r: (lowered(x, r) * weights).sum(), argnums=(0, 1))
    )(image, rois)
    np.testing.assert_allclose((by_image * image).sum(), (expected * weights).sum(), 1e-3, 1e-4)
    assert not by_rois.any()
    grad = torch.tensor(weights, device="jax")
    back = operators._roi_align_backward(
        grad, torch.tensor(rois, device="jax"), scale, *bins, *image.shape, ratio, aligned
    )
    np.testing.assert_allclose(back.cpu(), by_image, 1e-5, 1e-6)
    none = fn(torch.tensor(image, device="jax"), torch.zeros(0, 5, device="jax"))
    assert none.shape == (0, 3, *bins)


def test_how_many_boxes_are_kept_is_not_known_when_it_is_compiled(operators: Any) -> None:
    f = torch2jax(lambda boxes, scores: operators.nms(boxes, scores, 0.5), lower=True)
    with pytest.raises(DataDependentShape, match=r"torchvision\.nms"):
        jax.jit(f)(jnp.ones((3, 4)), jnp.ones(3))
