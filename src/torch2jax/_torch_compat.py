"""What differs between versions of torch, and its private functions. Imports torch, never JAX."""

from __future__ import annotations

from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._functorch.vmap import (
    _add_batch_dim,
    _remove_batch_dim,
    lazy_load_decompositions,
    vmap_increment_nesting,
)

add_batch_dim: Any = _add_batch_dim
remove_batch_dim: Any = _remove_batch_dim


def vmap_level(size: int) -> Any:
    """A context in which tensors can have rows that operators do not see; its value names it.

    Random numbers are the same in all rows.
    """
    lazy_load_decompositions()
    return vmap_increment_nesting(size, "same")


def outside_transforms() -> Any:
    """A context outside of all transforms of ``torch.func``: new tensors are plain."""
    return temporarily_clear_interpreter_stack()


def exchange_api() -> Any:
    """The capsule of torch's DLPack C exchange API, or None where torch has none (before 2.10)."""
    return getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
