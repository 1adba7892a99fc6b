"""torchvision's models as JAX programs: values and all gradients are PyTorch's, without the bridge.

Weights are random, images small. torchvision is no dependency, because its wheels pin one PyTorch:
`make test-ops` puts the one that belongs to this repository's into a folder of its own. Three models;
all with T2J_ALL_LOWERINGS=1.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import pytest
import torch
from test_lower_models import agrees, wave
from torch import nn

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
    # Sequential, because the name of the argument differs.
    agrees(nn.Sequential(model), {"input": wave(2, 3, size, size)}, False)
