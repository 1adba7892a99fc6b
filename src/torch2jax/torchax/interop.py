"""PyTorch and JAX call each other under torchax's names."""

from __future__ import annotations

import functools
from typing import Any

import jax
import torch

from .. import device as _device
from .calls import (
    Function,
    call_jax,
    call_torch,
    jax_jit,
    jax_view,
    jax_view_elem,
    torch_view,
    torch_view_elem,
    wrap_jax_jit,
)
from .jittable import JittableModule, extract_all_buffers, set_all_buffers

__all__ = [
    "JittableModule",
    "call_jax",
    "call_torch",
    "extract_all_buffers",
    "fori_loop",
    "gradient_checkpoint",
    "j2t_autograd",
    "jax_jit",
    "jax_shard_map",
    "jax_value_and_grad",
    "jax_view",
    "jax_view_elem",
    "set_all_buffers",
    "shard_map",
    "torch_view",
    "torch_view_elem",
    "wrap_jax_jit",
]


def j2t_autograd(fn: Function, call_jax: Function = call_jax) -> Function:
    """Turn a JAX function into one of tensors through which ``backward()`` goes, by ``jax.vjp``.

    Args:
      fn: a function of pytrees of arrays.
      call_jax: what calls ``fn`` where no gradient is wanted.
    """

    @functools.wraps(fn)
    def inner(*args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        if not torch.is_grad_enabled() or not any(
            isinstance(x, torch.Tensor) and x.requires_grad for x in leaves
        ):
            return call_jax(fn, *args, **kwargs)
        args, kwargs = jax.tree.map(
            lambda x: x if isinstance(x, torch.Tensor) else jax_view(x), (args, kwargs)
        )
        return _device.call_jax(fn, *args, **kwargs)

    return inner


fori_loop = torch_view(jax.lax.fori_loop)
shard_map = jax.shard_map


def jax_shard_map(
    torch_function: Function, kwargs_for_jax_shard_map: dict[str, Any] | None = None
) -> Function:
    """Apply ``jax.shard_map`` to a function of tensors on device jax, and compile it."""

    def compiled(fn: Function, **options: Any) -> Function:
        return jax.jit(shard_map(fn, **options))

    return wrap_jax_jit(torch_function, compiled, kwargs_for_jax_shard_map)


def jax_value_and_grad(
    torch_function: Function, kwargs_for_value_and_grad: dict[str, Any] | None = None
) -> Function:
    """Apply ``jax.value_and_grad`` to a function of tensors on device jax."""
    options = kwargs_for_value_and_grad or {}
    return torch_view(jax.value_and_grad(jax_view(torch_function), **options))


def gradient_checkpoint(torch_function: Function, kwargs: dict[str, Any] | None = None) -> Function:
    """Apply ``jax.checkpoint`` to a function of tensors; the backward pass runs it again."""
    return wrap_jax_jit(torch_function, jax.checkpoint, kwargs)
