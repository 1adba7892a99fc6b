"""``Tensor.__torch_dispatch__``: which of our objects carries out an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .operators import Operator
from .tensor import Tensor
from .view_operators import ViewOperator
from .views import GETTERS

__all__ = ["dispatch", "forget", "operator_of", "special"]

SPECIAL: dict[Any, Callable[..., Any]] = {}
"""Operators that are more than a function of arrays: they take and return tensors."""

_ops: dict[Any, Callable[[Any, Any], Any]] = {}


def special(*ops: Any) -> Callable[[Any], Any]:
    """Register a handler ``(args, kwargs) -> result`` of operators."""

    def register(fn: Any) -> Any:
        SPECIAL.update((op, fn) for op in ops if op is not None)
        return fn

    return register


def dispatch(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    return operator_of(func)(args, kwargs or {})


def operator_of(func: Any) -> Callable[[Any, Any], Any]:
    """What carries out an operator: ``(args, kwargs) -> result``."""
    op = _ops.get(func)
    if op is None:
        op = _ops[func] = _find(func)
    return op


def forget() -> None:
    """Look lowerings up again."""
    _ops.clear()


def _find(func: Any) -> Callable[[Any, Any], Any]:
    from .. import lowerings  # noqa: F401  fills the table
    from . import specials  # noqa: F401

    if func in SPECIAL:
        return SPECIAL[func]
    if func in GETTERS:
        return ViewOperator(func)
    if _makes_views(func) and func._can_decompose():
        return lambda args, kwargs: func.decompose(*args, **kwargs)
    return Operator(func)


def _makes_views(func: Any) -> bool:
    """Whether results may share the memory of an operand, as those of ``narrow``.

    PyTorch takes such an operator apart before it comes here, but not in ``torch.inference_mode``
    and not in its own kernels.
    """
    aliases = [r.alias_info for r in func._schema.returns]
    return any(a is not None and not a.is_write for a in aliases)


Tensor.__torch_dispatch__ = classmethod(dispatch)  # type: ignore[assignment]
