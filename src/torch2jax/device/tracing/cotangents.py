"""PyTorch's gradients as JAX's cotangents, and back: of complex values each is the conjugate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from ..._conversions.dtypes import dtype_j2t
from ..tensors.tensor import Tensor, read, wrap

__all__ = ["cotangents_of", "gradient_of"]


def cotangents_of(gradients: Sequence[Tensor | None], avals: Sequence[Any]) -> list[Any]:
    """The cotangents of results with these shapes and dtypes; a missing gradient is zero."""
    found = []
    for g, aval in zip(gradients, avals, strict=True):
        if not jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact):
            found.append(jax.numpy.zeros(aval.shape, jax.dtypes.float0))
        elif g is None:
            found.append(jax.numpy.zeros(aval.shape, aval.dtype))
        else:
            found.append(jax.numpy.conj(read(g)).astype(aval.dtype))
    return found


def gradient_of(cotangent: Any) -> Tensor | None:
    """The gradient for a cotangent; None for integers, which have none."""
    if cotangent is None or cotangent.dtype == jax.dtypes.float0:
        return None
    return wrap(jax.numpy.conj(cotangent), dtype_j2t(cotangent.dtype))
