"""``Tensor.__torch_dispatch__`` finds the object that carries out an operator.

The extension gets each call first. In eager mode it repeats by itself what has been done before;
see NOTE [Repeated calls] in ``cpp/device/eager.h``. It asks the functions here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import torch

from ... import lowerings as _lowerings  # noqa: F401  the import fills the table
from ..._bridge.handler.extension import eager_dispatch, forget_replays
from ..._compat.jax import ArrayImpl, trace_state_clean
from ..._conversions.dtypes import x64_enabled
from ...lowerings.registry import TABLE, Lowering
from ...lowerings.views import GETTERS
from ..tensors.sized_jit import Large
from ..tensors.tensor import (
    AFTER_DTYPE,
    Cell,
    Tensor,
    captures,
    make,
    note_sort,
    refuse_overlap,
)
from ..thread_state import state
from . import special as _handlers  # noqa: F401  the import fills the table
from .operator import Operator
from .special.table import SPECIAL, special
from .view_operator import ViewOperator

__all__ = ["dispatch", "forget", "operator_of", "special"]

_ops: dict[Any, Callable[[Any, Any], Any]] = {}


def operator_of(func: Any) -> Callable[[Any, Any], Any]:
    """Return the object that carries out an operator, called as ``(args, kwargs) -> result``."""
    ops = _ops  # another thread may forget them meanwhile
    op = ops.get(func)
    if op is None:
        op = ops[func] = _find(func)
    return op


def forget() -> None:
    """Forget all operators, so that their lowerings are looked up again."""
    global _ops
    _ops = {}
    forget_replays()


def _find(func: Any) -> Callable[[Any, Any], Any]:
    if func in SPECIAL:
        return SPECIAL[func]
    if func in GETTERS:
        return ViewOperator(func)
    if _makes_views(func) and func._can_decompose():
        return lambda args, kwargs: func.decompose(*args, **kwargs)
    op = Operator(func)
    if not op.route.returns_values:
        return op
    decomposition = op.route.decomposition
    return lambda args, kwargs: decomposition(*args, **kwargs)


def _makes_views(func: Any) -> bool:
    """Say whether results may share the memory of an operand, as those of ``narrow`` do.

    PyTorch takes such an operator apart before it comes here, except in ``torch.inference_mode``
    and in its own kernels.
    """
    aliases = [r.alias_info for r in func._schema.returns]
    return func._opname in _UNSAID or any(a is not None and not a.is_write for a in aliases)


_UNSAID = {"atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "meshgrid"}
"""The results of these operators may be views, although their schemas do not say so."""


# --- what the extension asks ---------------------------------------------------------------------

_situations: dict[Any, Any] = {}


def _situation() -> Any:
    """Return one object for all that programs depend on beside their arguments.

    None says that Python has to look at each call.
    """
    if captures or not trace_state_clean() or state.lowering or state.events is not None:
        return None
    now = x64_enabled(), torch.get_default_dtype()
    return _situations.setdefault(now, now)


def _describe(func: Any) -> Any:
    """Return the object that carries out an operator, and how to tell its calls apart, or None."""
    op = operator_of(func)
    if type(op) is ViewOperator:
        return op, (True, (), {}, False)
    if type(op) is not Operator or not op.repeats:
        return op, None
    route = op.route
    named = dict(zip(route.names, route.scalars, strict=True))
    return op, (False, tuple(route.scalars), named, route.writes_several)


def _replay(op: Operator | ViewOperator, args: Any, kwargs: Any, result: Any) -> Any:
    return op.replay(args, kwargs, result)


def _may_write(x: Tensor, op: Operator) -> None:
    refuse_overlap(x, op.route.fills)


dispatch = eager_dispatch(
    tensor_type=Tensor,
    array_type=ArrayImpl,
    cell_type=Cell,
    make=make,
    after_dtype=AFTER_DTYPE,
    constants=(torch.dtype, torch.layout, torch.memory_format),
    situation=_situation,
    describe=_describe,
    replay=_replay,
    array=jax.numpy.asarray,
    may_write=_may_write,
    inference=torch.is_inference_mode_enabled,
    sort=note_sort,
    large=Large,
)
"""It is called as ``(operator, types, args=(), kwargs=None)`` and carries out an operator."""

Tensor.__torch_dispatch__ = dispatch  # type: ignore[assignment]


def register_lowering(op: Any, fn: Callable[..., Any]) -> None:
    """Register a lowering of your own for an operator, yours or PyTorch's.

    Args:
        op: an operator overload such as ``torch.ops.aten.add.Tensor``, or a packet such as
            ``torch.ops.mine.op``, which stands for all of its overloads. It must not write to its
            arguments: in-place forms follow from the functional form.
        fn: a function that takes what the operator takes, with JAX arrays for tensors and Python
            values for the rest. It returns an array, or a tuple of arrays. It is traced: shapes
            are known, values are not. Derivatives under ``lower=True`` are JAX's own, of ``fn``;
            ``backward()`` uses the derivative that PyTorch has for ``op``.

    Raises:
        TypeError: ``op`` is not an operator, or ``fn`` cannot be called.

    >>> import torch, torch2jax, jax.numpy as jnp
    >>> torch2jax.device.register_lowering(torch.ops.aten.sinc.default, jnp.sinc)
    """
    if isinstance(op, torch._ops.OpOverloadPacket):
        overloads = [getattr(op, name) for name in op.overloads()]
    elif isinstance(op, torch._ops.OpOverload):
        overloads = [op]
    else:
        raise TypeError(f"register_lowering takes an operator of torch.ops, got {op!r}.")
    if not callable(fn):
        raise TypeError(f"register_lowering takes a function of arrays, got {fn!r}.")
    for one in overloads:
        TABLE[one] = Lowering(fn, replaced=True)
    forget()
