"""A view has torchax's name here: a tensor that shares memory is a tensor like any other."""

from ..device.tensors.tensor import Tensor as View

__all__ = ["View"]
