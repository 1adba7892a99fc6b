"""The tensor under torchax's name."""

from ..device.tensor import Tensor

__all__ = ["Tensor"]
