"""Users register operators of their own under torchax's names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ... import device as _device
from ..calls import call_jax
from ..environment import default_env

__all__ = ["register_torch_dispatch_op", "register_torch_function_op"]


def register_torch_dispatch_op(
    aten_op: Any,
    impl_callable: Callable[..., Any],
    is_jax_function: bool = True,
    is_user_defined: bool = False,
    needs_env: bool = False,
    is_view_op: bool = False,
) -> Any:
    """Use a function of arrays, or of tensors, for an operator of ``torch.ops``.

    Args:
      aten_op: an overload, or a packet, which stands for all of its overloads.
      impl_callable: a function that takes what the operator takes. One of arrays is registered by
        ``device.register_lowering``.
      is_jax_function: whether the function takes arrays.
      is_user_defined: has no effect: what is registered last is used.
      needs_env: whether the function takes the environment as ``env=``.
      is_view_op: has no effect: results share memory where ``impl_callable`` makes them share it.

    Returns:
      ``impl_callable``.
    """
    impl = _with_env(impl_callable, needs_env)
    if is_jax_function:
        _device.register_lowering(aten_op, impl)
    else:
        default_env().override_op_definition(aten_op, impl)
    return impl_callable


def register_torch_function_op(
    torch_func: Any,
    impl_callable: Callable[..., Any],
    is_jax_function: bool = True,
    is_user_defined: bool = False,
    needs_env: bool = False,
    is_view_op: bool = False,
) -> Any:
    """Use a function of arrays, or of tensors, for one of PyTorch's such as ``F.gelu``.

    The function is used in the default environment, which means within ``with env`` and in what
    ``interop`` compiles. The arguments are those of ``register_torch_dispatch_op``.

    Returns:
      ``impl_callable``.
    """
    impl = _with_env(impl_callable, needs_env)
    if is_jax_function:
        impl = functools.partial(call_jax, impl)
    default_env().override_op_definition(torch_func, impl)
    return impl_callable


def _with_env(impl: Callable[..., Any], needs_env: bool) -> Callable[..., Any]:
    return functools.partial(impl, env=default_env()) if needs_env else impl
