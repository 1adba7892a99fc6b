"""``Tensor.__torch_dispatch__``: which of our objects carries out an operator.

The extension has the call first, and repeats by itself what has been done before in eager mode: see
NOTE [Repeated calls] in ``cpp/eager.h``. It asks the functions here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import torch

from .._compat import ArrayImpl, trace_state_clean
from .._dtypes import x64_enabled
from .._ffi import eager_dispatch, forget_plans
from .operators import Operator
from .state import state
from .tensor import OPTIONS, Cell, Tensor, captures, make, refuse_overlap
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


def operator_of(func: Any) -> Callable[[Any, Any], Any]:
    """What carries out an operator: ``(args, kwargs) -> result``."""
    ops = _ops  # which may be forgotten meanwhile
    op = ops.get(func)
    if op is None:
        op = ops[func] = _find(func)
    return op


def forget() -> None:
    """Look lowerings up again."""
    global _ops
    _ops = {}
    forget_plans()


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
    return func._opname in _UNSAID or any(a is not None and not a.is_write for a in aliases)


_UNSAID = {"atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "meshgrid"}
"""Those whose schema does not say so."""


# --- what the extension asks ---------------------------------------------------------------------

_situations: dict[Any, Any] = {}


def _situation() -> Any:
    """What programs depend on beside arguments; None while calls are looked at one by one."""
    if captures or not trace_state_clean() or state.lowering or state.events is not None:
        return None
    now = x64_enabled(), torch.get_default_dtype()
    return _situations.setdefault(now, now)


def _describe(func: Any) -> Any:
    """Python's way of an operator; of one whose calls are repeated what tells them apart."""
    op = operator_of(func)
    if type(op) is ViewOperator:
        return op, (True, (), {}, False)
    if type(op) is not Operator or not op.compiles or op.route.random:
        return op, None
    route = op.route
    named = dict(zip(route.names, route.scalars, strict=True))
    return op, (False, tuple(route.scalars), named, route.writes_several)


def _plan(op: Operator | ViewOperator, args: Any, kwargs: Any) -> Any:
    return op.plan(args, kwargs)


def _may_write(x: Tensor, op: Operator) -> None:
    refuse_overlap(x, op.route.fills)


dispatch = eager_dispatch(
    tensor_type=Tensor,
    array_type=ArrayImpl,
    cell_type=Cell,
    make=make,
    options=("dtype", *OPTIONS),
    given=tuple(OPTIONS.values()),
    constants=(torch.dtype, torch.layout, torch.memory_format),
    situation=_situation,
    describe=_describe,
    plan=_plan,
    array=jax.numpy.asarray,
    may_write=_may_write,
    inference=torch.is_inference_mode_enabled,
)
"""``(operator, types, args=(), kwargs=None)``: carries out an operator."""

Tensor.__torch_dispatch__ = dispatch  # type: ignore[assignment]
