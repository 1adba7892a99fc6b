"""These functions convert tensors and dtypes to JAX's and back, under torchax's names."""

from __future__ import annotations

from typing import Any

import jax
import torch

from ..._conversions.dtypes import canonical, dtype_j2t
from ..environment import default_env

__all__ = ["j2t", "j2t_dtype", "t2j", "t2j_dtype"]


def t2j(t: torch.Tensor, use_dlpack: bool = True) -> jax.Array:
    """Return a tensor as an array: the one that it holds on device jax, elsewhere a copy."""
    return default_env().t2j_copy(t)


def j2t(x: jax.Array, use_dlpack: bool = True) -> torch.Tensor:
    """Copy an array into a tensor in PyTorch's own CPU memory."""
    return default_env().j2t_copy(x)


def t2j_dtype(dtype: torch.dtype) -> Any:
    """Return the dtype of the array of such a tensor; it has 32 bits for 64 while x64 is off."""
    return canonical(dtype)


def j2t_dtype(dtype: Any) -> torch.dtype:
    """Return the dtype of the tensor of such an array."""
    return dtype_j2t(dtype)
