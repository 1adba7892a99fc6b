"""Users register operators of their own under torchax's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..environment import default_env
from ..registry import Operator, Operators

__all__ = [
    "Operator",
    "all_aten_ops",
    "all_torch_functions",
    "register_torch_dispatch_op",
    "register_torch_function_op",
]

all_aten_ops: Operators = default_env()._ops
all_torch_functions: Operators = default_env()._ops
"""Both are ``default_env()._ops``: what computes each operator, and each overridden function."""


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
    all_aten_ops[aten_op] = Operator(
        aten_op, impl_callable, is_jax_function, is_user_defined, needs_env, is_view_op
    )
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
    return register_torch_dispatch_op(
        torch_func, impl_callable, is_jax_function, is_user_defined, needs_env, is_view_op
    )
