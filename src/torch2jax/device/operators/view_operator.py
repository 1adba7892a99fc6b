"""A view operator's results share its operand's memory, one step further in the chain."""

from __future__ import annotations

from typing import Any

import torch
from jax.core import Tracer
from torch.utils._python_dispatch import _disable_current_modes

from ..._conversions.float64 import WIDE_FLOATS, is_carried
from ..._conversions.narrowed import NARROWED
from ..._errors import Torch2JaxError, UnsupportedDtypeError
from ...lowerings.views import OTHER_ELEMENTS, OTHER_VALUES
from ..tensors.tensor import Tensor, captures, sort_of, wrap_view
from ..tensors.view_chains import ROOT
from ..thread_state import state
from .operands import from_other_device

__all__ = ["ViewOperator", "stopped"]


def _frozen(x: Any) -> Any:
    return tuple(map(_frozen, x)) if isinstance(x, list | tuple) else x


class ViewOperator:
    """A view operator carries out an operator whose results share the memory of its operand."""

    def __init__(self, func: Any) -> None:
        self.func = func
        self.strided = func is torch.ops.aten.as_strided.default
        self.plain = func in (torch.ops.aten.alias.default, torch.ops.aten.detach.default)
        self.detach = func is torch.ops.aten.detach.default
        self.takes_lists = any("List" in str(a.type) for a in func._schema.arguments)
        self.known: dict[Any, Any] = {}
        """Chain and geometry of each result, by those of the operand and by the arguments."""

    def __call__(self, args: Any, kwargs: Any) -> Any:
        x: Any = args[0]
        if torch.is_inference_mode_enabled() and not x.is_inference():
            with torch.inference_mode(False):  # a view of an ordinary tensor is ordinary
                return self(args, kwargs)
        if type(x) is not Tensor:
            return self.func(from_other_device(x), *args[1:], **kwargs)
        if captures:
            for capture in captures:
                capture.seen(x)
        if state.events is not None and not state.composite:
            state.events.add(self.func, "native")
        chain = x._chain
        stops = state.lowering and self._stops() and isinstance(x._cell.array, Tracer)
        if self.plain:
            if stops:
                chain = stopped(chain, x.shape)
            start: Any = x.storage_offset()
            return wrap_view(x, chain, x.dtype, x.shape, x.stride(), start)
        key = self.key(x, args, kwargs)
        found: Any = self.known.get(key)
        if found is None:
            if len(self.known) > 16384:
                self.known.clear()
            found = self.known[key] = self._found(x, *key)
        if stops:
            ended = [(stopped(where[0], where[2]), *where[1:]) for where in _listed(found)]
            found = ended if type(found) is list else ended[0]
        if type(found) is list:
            return [wrap_view(x, *where) for where in found]
        return wrap_view(x, *found)

    def _stops(self) -> bool:
        """Say whether JAX's derivative ends here; see NOTE [Detached by the user]."""
        off = not (state.kept or torch.is_grad_enabled())
        return off or (self.detach and state.detaching > 0)

    def key(self, x: Tensor, args: Any, kwargs: Any) -> tuple[Any, ...]:
        rest = tuple(map(_frozen, args[1:])) if self.takes_lists else args[1:]
        if kwargs:
            rest = self._positional(rest, kwargs)
        stride: Any = x.stride()
        return x._chain, x.dtype, x.shape, stride, x.storage_offset(), rest

    def replay(self, args: Any, kwargs: Any, result: Any) -> Any:
        """Return how the extension repeats calls like this one, which has been made."""
        x = args[0]
        if self.plain:
            found: Any = (x._chain, x.dtype, x.shape, x.stride(), x.storage_offset())
        else:
            found = self.known.get(self.key(x, args, kwargs))
        if found is None:
            return None
        if type(found) is list:
            return x._chain, tuple(map(_with_sort, found)), True
        return x._chain, _with_sort(found), False

    def _found(
        self, x: Tensor, chain: Any, dtype: Any, size: Any, stride: Any, offset: Any, rest: Any
    ) -> Any:
        if self.func is torch.ops.aten.view.dtype:
            _check_bits(dtype, rest[0])
        found = geometry(self.func, rest, dtype, size, stride, offset)
        if self.strided:
            return self._as_strided(x, rest, found)
        base, here = chain or ROOT, (dtype, size, stride, offset)
        blurs = self.func in OTHER_ELEMENTS and base.overlaps(size, stride)

        def further(where: Any, index: int | None = None) -> Any:
            if where == here and self.func not in OTHER_VALUES:  # it sees what its operand sees
                return (chain, *where)
            step = base.then(size, self.func, rest, index)
            step.blurred = step.blurred or blurs
            return (step, *where)

        if type(found) is list:
            return [further(where, i) for i, where in enumerate(found)]
        return further(found)

    def _positional(self, rest: tuple[Any, ...], kwargs: Any) -> tuple[Any, ...]:
        """Return all arguments by position, with PyTorch's defaults between them."""
        full = list(rest)
        for argument in self.func._schema.arguments[1 + len(rest) :]:
            full.append(_frozen(kwargs.get(argument.name, argument.default_value)))
        return tuple(full)

    def _as_strided(self, x: Tensor, rest: Any, found: Any) -> Any:
        """Address the memory itself, whatever part of it the operand sees."""
        offset = rest[2] if len(rest) > 2 and rest[2] is not None else x.storage_offset()
        steps = x._chain.steps if x._chain is not None else ()
        if any(s.op in OTHER_ELEMENTS for s in steps):
            raise Torch2JaxError(
                "as_strided of a view with another dtype is not supported on device jax; clone() "
                "the view first."
            )
        size, stride, there = rest[0], rest[1], x._cell.array.size
        ends = [(n - 1) * s for n, s in zip(size, stride, strict=True)]
        if 0 not in size and not 0 <= offset + sum(ends) < there:
            raise RuntimeError(
                f"setStorage: sizes {list(size)}, strides {list(stride)}, storage offset {offset} "
                f"are out of bounds for storage of {there} elements"
            )
        return (ROOT.then((), self.func, (size, stride, offset)), *found)


def _check_bits(old: torch.dtype, new: torch.dtype) -> None:
    for dtype, other in ((old, new), (new, old)):
        if is_carried(dtype) and other is not dtype and other not in WIDE_FLOATS:
            raise UnsupportedDtypeError(
                f"a view of {old} as {new} would show bits of {dtype}, which device jax carries as "
                f"{NARROWED[dtype]} while 64-bit values are switched off in JAX. Switch them on, "
                'jax.config.update("jax_enable_x64", True), or view it on the CPU.'
            )


def _with_sort(where: Any) -> tuple[Any, ...]:
    return (*where, sort_of(where[1], where[2]))


def _listed(found: Any) -> list[Any]:
    return found if type(found) is list else [found]


def stopped(chain: Any, size: Any) -> Any:
    """Return the chain with one step more, which ends JAX's derivative."""
    return (chain or ROOT).then(tuple(size), torch.ops.aten.detach.default, ())


def geometry(
    op: Any,
    args: tuple[Any, ...],
    dtype: torch.dtype,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
) -> Any:
    """Ask torch for (dtype, sizes, strides, offset) of a view operator's result or results."""
    with _disable_current_modes(), torch.no_grad():
        room = offset + 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True) if n)
        base = torch.empty(room, dtype=dtype, device="meta").as_strided(size, stride, offset)
        out = op(base, *args)

    def of(x: torch.Tensor) -> Any:
        return x.dtype, tuple(x.shape), x.stride(), x.storage_offset()

    return [of(x) for x in out] if isinstance(out, list | tuple) else of(out)
