"""A composite is an operator that an exported program calls as one function of its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from ..calls import call_torch
from .ops_registry import register_torch_dispatch_op

__all__ = ["register_jax_composite", "register_torch_composite"]


def register_jax_composite(
    composite_name: str, impl: Callable[..., Any], *ops: Any, **jit_args: Any
) -> None:
    """Use a function of arrays for operators, compiled under a name.

    Args:
      composite_name: the name of the function in StableHLO.
      impl: a function of arrays that takes what the operators take.
      *ops: operators of ``torch.ops``.
      **jit_args: options of ``jax.jit``.
    """

    def composite(*args: Any) -> Any:
        return impl(*args)

    composite.__name__ = composite.__qualname__ = composite_name
    compiled = jax.jit(composite, **jit_args)
    for one in ops:
        register_torch_dispatch_op(one, compiled)


def register_torch_composite(
    composite_name: str, impl: Callable[..., Any], *ops: Any, **jit_args: Any
) -> None:
    """Use a function of tensors for operators, as ``register_jax_composite`` uses one of arrays."""

    def of_arrays(*args: Any) -> Any:
        return call_torch(impl, *args)

    register_jax_composite(composite_name, of_arrays, *ops, **jit_args)
