"""Arrays of less than 8 bits stand behind tensors of dtypes that PyTorch has.

PyTorch has no int4. A tensor shows such an array as int8, and operators compute with its values as
int8. Nothing but the array itself has the small dtype.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from .dtypes import dtype_j2t

__all__ = ["PACKED", "SHOWN", "shown_dtype", "widened"]

PACKED: Any = getattr(torch, "float4_e2m1fn_x2", None)
"""PyTorch packs two values in one element of this dtype; here each element shows one."""

_ROWS = (
    ("int4", torch.int8, np.int8),
    ("uint4", torch.uint8, np.uint8),
    ("int2", torch.int8, np.int8),
    ("uint2", torch.uint8, np.uint8),
    ("float4_e2m1fn", PACKED, np.float32),
)
_KNOWN = [
    (np.dtype(getattr(jnp, name)), shown, np.dtype(wide))
    for name, shown, wide in _ROWS
    if hasattr(jnp, name) and shown is not None
]
SHOWN: dict[Any, torch.dtype] = {small: shown for small, shown, _ in _KNOWN}
_WIDE: dict[Any, Any] = {small: wide for small, _, wide in _KNOWN}


def shown_dtype(dtype: Any) -> torch.dtype:
    """Return the dtype of the tensor of such an array; small dtypes have a wider one."""
    shown = SHOWN.get(dtype)
    return dtype_j2t(dtype) if shown is None else shown


def widened(array: Any) -> Any:
    """Return an array of a small dtype as one in which its values are computed with."""
    wide = _WIDE.get(array.dtype)
    return array if wide is None else array.astype(wide)
