"""Dtypes of tensors and arrays correspond as in torchax, dtypes of 4 bits included."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from .._conversions.dtypes import TO_JAX, canonical
from .._conversions.small import PACKED, SHOWN, shown_dtype

__all__ = ["JAX_DTYPE_TO_TORCH", "TORCH_DTYPE_TO_JAX", "j2t_dtype", "t2j_dtype"]

TORCH_DTYPE_TO_JAX: dict[Any, Any] = {**TO_JAX, None: None}
if PACKED in SHOWN.values():
    TORCH_DTYPE_TO_JAX[PACKED] = np.dtype(jnp.float4_e2m1fn)
JAX_DTYPE_TO_TORCH: dict[Any, Any] = {
    **{mine: theirs for theirs, mine in TORCH_DTYPE_TO_JAX.items()},
    **SHOWN,
}
"""The tables have 64-bit dtypes whatever JAX's x64 says; ``t2j_dtype`` asks."""


def t2j_dtype(dtype: torch.dtype | None) -> Any:
    """Return the dtype of the array of such a tensor; it has 32 bits for 64 while x64 is off."""
    if dtype is None or dtype is PACKED:
        return TORCH_DTYPE_TO_JAX[dtype]
    return canonical(dtype)


def j2t_dtype(dtype: Any) -> Any:
    """Return the dtype of the tensor of such an array: int8 for int4, uint8 for uint4."""
    if dtype is None:
        return None
    kind = jnp.dtype(dtype) if isinstance(dtype, type) or hasattr(dtype, "dtype") else dtype
    return shown_dtype(kind)
