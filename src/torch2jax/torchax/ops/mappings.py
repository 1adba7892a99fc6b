"""These functions convert tensors and dtypes to JAX's and back, under torchax's names."""

from __future__ import annotations

import jax
import torch

from ...device.tensors.tensor import Tensor, to_torch
from ..dtypes import JAX_DTYPE_TO_TORCH, TORCH_DTYPE_TO_JAX, j2t_dtype, t2j_dtype
from ..environment import default_env

__all__ = [
    "JAX_DTYPE_TO_TORCH",
    "NUMPY_UNSUPPORTED_DTYPES",
    "TORCH_DTYPE_TO_JAX",
    "j2t",
    "j2t_dtype",
    "t2j",
    "t2j_dtype",
]

NUMPY_UNSUPPORTED_DTYPES = {
    theirs: mine
    for theirs, mine in TORCH_DTYPE_TO_JAX.items()
    if theirs is not None and mine.isbuiltin != 1
}
"""The dtypes that NumPy itself lacks, such as bfloat16, with those of JAX."""


def t2j(t: torch.Tensor, use_dlpack: bool = True) -> jax.Array:
    """Return a tensor as an array: the one that it holds on device jax, elsewhere a copy."""
    return default_env().t2j_copy(t)


def j2t(x: jax.Array | torch.Tensor, use_dlpack: bool = True) -> torch.Tensor:
    """Copy an array, or a tensor on device jax, into a tensor in PyTorch's own CPU memory."""
    if isinstance(x, Tensor):
        return to_torch(x.detach(), "j2t")  # type: ignore[arg-type]
    return default_env().j2t_copy(x)
