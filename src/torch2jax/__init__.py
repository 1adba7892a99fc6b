"""PyTorch functions as JAX functions. See ``torch2jax``."""

from torch import Size

from . import _rules as _rules  # registers the primitive's rules
from ._convert import dtype_j2t, dtype_t2j, j2t, t2j, tree_j2t, tree_t2j
from ._errors import (
    DifferentiationError,
    SignatureError,
    Torch2JaxError,
    Torch2JaxWarning,
    TorchCallError,
    UnsupportedDtypeError,
)
from ._wrap import torch2jax, torch2jax_with_vjp, torch2jax_without_vjp

__version__ = "0.1.0"

__all__ = [
    "DifferentiationError",
    "SignatureError",
    "Size",
    "Torch2JaxError",
    "Torch2JaxWarning",
    "TorchCallError",
    "UnsupportedDtypeError",
    "__version__",
    "dtype_j2t",
    "dtype_t2j",
    "j2t",
    "t2j",
    "torch2jax",
    "torch2jax_with_vjp",
    "torch2jax_without_vjp",
    "tree_j2t",
    "tree_t2j",
]
