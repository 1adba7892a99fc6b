"""PyTorch's gradients become JAX's cotangents, and back. This file never imports torch.

NOTE [Conjugates]. PyTorch's gradient is the conjugate transpose; JAX's cotangent is the plain one:
``Jᴴ c = conj(Jᵀ conj(c))``. The other direction is in ``torch_side/derivatives.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def cotangents_of(
    gradients: Iterable[Any], avals: Iterable[tuple[tuple[int, ...], Any]]
) -> list[Any]:
    """Return the cotangents of results of these shapes and dtypes.

    ``gradients`` are those of autograd: arrays, and None where it has none. Results that are not
    floating or complex get JAX's float0.
    """
    return [_cotangent(g, shape, dtype) for g, (shape, dtype) in zip(gradients, avals, strict=True)]


def _cotangent(gradient: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    if not jnp.issubdtype(dtype, jnp.inexact):
        return np.zeros(shape, jax.dtypes.float0)
    return jnp.zeros(shape, dtype) if gradient is None else jnp.conj(gradient).astype(dtype)


def gradient_of(cotangent: Any) -> Any:
    """Return the gradient for autograd; None for an integer operand, which has none."""
    if cotangent is None or cotangent.dtype == jax.dtypes.float0:
        return None
    return jnp.conj(cotangent)
