"""Gradients of PyTorch's autograd on device "jax" become cotangents, and back.

``_conversions/cotangents.py`` has the arithmetic; here tensors stand for its arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..._conversions import cotangents
from ..._conversions.dtypes import dtype_j2t
from ..tensors.tensor import Tensor, read, wrap

__all__ = ["cotangents_of", "gradient_of"]


def cotangents_of(gradients: Sequence[Tensor | None], avals: Sequence[Any]) -> list[Any]:
    """Return the cotangents of results with these avals; a missing gradient is zero."""
    arrays = [None if g is None else read(g) for g in gradients]
    return cotangents.cotangents_of(arrays, [(a.shape, a.dtype) for a in avals])


def gradient_of(cotangent: Any) -> Tensor | None:
    """Return the gradient for a cotangent; None for integers, which have none."""
    gradient = cotangents.gradient_of(cotangent)
    return None if gradient is None else wrap(gradient, dtype_j2t(gradient.dtype))
