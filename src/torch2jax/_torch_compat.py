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
    """A context in which new tensors are plain, whatever transforms of ``torch.func`` are at work."""
    return temporarily_clear_interpreter_stack()


def exchange_api() -> Any:
    """The capsule of torch's DLPack C exchange API, or None where torch has none (before 2.10)."""
    return getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


def set_up_device(name: str, module: Any) -> None:
    """Make PyTorch's device for libraries one of Python alone, called ``name``."""
    try:
        from torch.utils.backend_registration import (
            _setup_privateuseone_for_python_backend as set_up,
        )
    except ImportError:
        raise RuntimeError(
            "this PyTorch cannot have a device made in Python; install a newer one for "
            " torch2jax(..., lower=True) and device.enable()."
        ) from None
    set_up(name, backend_module=module)
