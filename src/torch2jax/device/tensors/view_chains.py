"""A chain has the steps from the array in a tensor's cell to what the tensor sees.

A step is a view operator with its arguments. In eager mode a compiled program reads or writes
through a chain, and the place where a step starts in its dimension is an operand of the program.
The chains of ``x[0]`` and ``x[1]`` have one ``pattern`` and two ``starts``, so that a loop over an
index compiles once. While a trace is under way starts are numbers, of which XLA makes better
programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch

from ..._compat.jax import trace_state_clean
from ..._conversions.dtypes import x64_enabled
from ..._errors import Torch2JaxError
from ...lowerings.views import (
    GETTERS,
    OTHER_ELEMENTS,
    SELECT_AT,
    SETTERS,
    SLICE_AT,
    scatter,
    slice_of,
    split_sizes,
)
from .sized_jit import SizedJit

__all__ = ["ROOT", "Chain", "Pattern", "Step"]

aten = torch.ops.aten


class Step:
    """A step is one view operator with its arguments; ``index`` picks one of several results.

    With a ``slot`` the first argument is the start of that number.
    """

    __slots__ = ("args", "index", "op", "slot")

    def __init__(
        self, op: Any, args: tuple[Any, ...], index: int | None, slot: int | None = None
    ) -> None:
        self.op, self.args, self.index, self.slot = op, args, index, slot

    def at(self, starts: Any) -> Step:
        if self.slot is None:
            return self
        return Step(self.op, (starts[self.slot], *self.args), self.index)

    def get(self, x: Any) -> Any:
        out = GETTERS[self.op](x, *self.args)
        return out if self.index is None else out[self.index]

    def set(self, x: Any, value: Any) -> Any:
        setter = SETTERS[self.op]
        if self.index is None:
            return setter(x, value, *self.args)
        return setter(x, value, self.index, *self.args)


class Pattern:
    """A pattern has steps without starts. ``operand`` is the array, or the array and the starts."""

    __slots__ = ("_next", "count", "jitted", "steps")

    def __init__(self, steps: tuple[Step, ...], count: int) -> None:
        self.steps, self.count = steps, count
        self._next: dict[Any, Pattern] = {}
        self.jitted = SizedJit(self.get)

    def get(self, operand: Any) -> Any:
        array, steps = self._with_starts(operand)
        return _get(steps, array)

    def set(self, operand: Any, latest: Any, value: Any) -> Any:
        """Return the new array, from ``latest`` where the operand's has been written to before."""
        array, steps = self._with_starts(operand)
        return _set(steps, array if latest is None else latest, value)

    def _with_starts(self, operand: Any) -> tuple[Any, tuple[Step, ...]]:
        if not self.count:
            return operand, self.steps
        array, starts = operand
        return array, tuple(step.at(starts) for step in self.steps)

    def then(self, op: Any, args: tuple[Any, ...], index: int | None, moves: bool) -> Pattern:
        key = (op, args, index, moves)
        pattern = self._next.get(key)
        if pattern is None:
            step = Step(op, args, index, self.count if moves else None)
            # Two threads may both make one; the first one stays.
            new = Pattern((*self.steps, step), self.count + moves)
            pattern = self._next.setdefault(key, new)
        return pattern


class Chain:
    """A chain has the steps of one view, with numbers; views of one pattern share programs."""

    __slots__ = (
        "_next", "_overlaps", "_starts_on_device", "_used", "blurred", "pattern", "starts", "steps",
        "stops",
    )  # fmt: skip

    def __init__(self, steps: tuple[Step, ...], pattern: Pattern, starts: tuple[int, ...]) -> None:
        self.steps, self.pattern = steps, pattern
        self.stops = any(step.op is aten.detach.default for step in steps)
        """Whether JAX's derivative ends here."""
        self.starts = np.array(starts, np.int32) if starts else None
        self._starts_on_device: Any = None
        self._used = False
        self._overlaps: bool | None = None
        self.blurred = False
        """Whether it sees elements several times with other values, so that none can be set."""
        self._next: dict[Any, Chain] = {}

    def get(self, array: Any) -> Any:
        return _get(self.steps, array)

    def set(self, array: Any, value: Any) -> Any:
        return _set(self.steps, array, value)

    def operand(self, array: Any) -> Any:
        """Return the operand of the pattern's programs for this view of an array."""
        if self.starts is None:
            return array
        if self._starts_on_device is not None:
            return array, self._starts_on_device
        if self._used and trace_state_clean():
            # The view is used again. From here on a call costs 2 µs less.
            self._starts_on_device = jax.device_put(self.starts)
        self._used = True
        return array, self.starts

    def overlaps(self, size: Sequence[int], stride: Sequence[int]) -> bool:
        """Say whether the view, of these sizes and strides, sees an element several times."""
        if self._overlaps is None:
            self._overlaps = overlaps(size, stride)
        return self._overlaps

    def read(self, array: Any) -> Any:
        """Compute the values of the view by a compiled program."""
        return self.pattern.jitted(self.operand(array))

    def then(
        self, size: tuple[int, ...], op: Any, args: tuple[Any, ...], index: int | None = None
    ) -> Chain:
        """Go one step further from a view of this size. Chains are kept, but not all for ever."""
        key = (size, op, args, index)
        chain = self._next.get(key)
        if chain is None:
            if len(self._next) > 4096:
                self._next.clear()
            chain = self._further(*key)
            chain.blurred = self.blurred
            self._next[key] = chain
        return chain

    def _further(
        self, size: tuple[int, ...], op: Any, args: tuple[Any, ...], index: int | None
    ) -> Chain:
        steps = (*self.steps, Step(op, args, index))
        starts = () if self.starts is None else tuple(self.starts.tolist())
        moving = _moving(size, op, args, index)
        if moving is None:
            return Chain(steps, self.pattern.then(op, args, index, False), starts)
        op, start, args = moving
        return Chain(steps, self.pattern.then(op, args, None, True), (*starts, start))


def _is_far(start: int) -> bool:
    """Say whether a start is beyond int32, so that a program has to be compiled for it alone."""
    if start < 2**31:
        return False
    if not x64_enabled():
        raise Torch2JaxError(
            f"a view that begins at element {start} of a dimension needs 64-bit indices, which JAX "
            'has switched off. Switch them on: jax.config.update("jax_enable_x64", True).'
        )
    return True


def _moving(size: tuple[int, ...], op: Any, args: Any, index: Any) -> Any:
    """Return a part of one dimension as (operator that takes a start, start, other arguments).

    The result is None where the step takes no such part, and for the whole of the dimension.
    """
    if op is aten.select.int or op is aten.unbind.int:
        dim, start = args if index is None else ((args or (0,))[0], index)
        dim %= len(size)
        start %= size[dim]
        return None if _is_far(start) else (SELECT_AT, start, (dim,))
    if op is aten.slice.Tensor:
        dim, start, count, step = slice_of(size, *args)
    elif op is aten.split.Tensor or op is aten.split_with_sizes.default:
        dim, step = args[1] if len(args) > 1 else 0, 1
        sizes = split_sizes(size[dim], args[0]) if op is aten.split.Tensor else args[0]
        start, count = sum(sizes[:index]), sizes[index]
    else:
        return None
    dim %= len(size)
    if count in (0, size[dim]) or _is_far(start):
        return None
    return SLICE_AT, start, (dim, count, step)


def _get(steps: tuple[Step, ...], array: Any) -> Any:
    for step in steps:
        array = step.get(array)
    return array


def _set(steps: tuple[Step, ...], array: Any, value: Any) -> Any:
    """Return the new array: set runs of steps that select elements, and other steps between."""
    for k, step in enumerate(steps):
        if step.op in OTHER_ELEMENTS or step.op is aten.detach.default:
            before = _get(steps[:k], array)
            after = _set(steps[k + 1 :], step.get(before), value)
            return _set_elements(steps[:k], array, step.set(before, after))
    return _set_elements(steps, array, value)


def _set_elements(steps: tuple[Step, ...], array: Any, value: Any) -> Any:
    if any(step.op not in SETTERS for step in steps):
        # A step (unfold) may see an element several times, even where the whole view does not.
        return scatter(lambda x: _get(steps, x), array, value)
    if not steps:
        return value
    seen = [array]
    for step in steps[:-1]:
        seen.append(step.get(seen[-1]))
    for step, x in zip(reversed(steps), reversed(seen), strict=True):
        value = step.set(x, value)
    return value


ROOT = Chain((), Pattern((), 0), ())


def overlaps(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Say whether a view sees an element of memory several times."""
    if 0 in size:
        return False
    reach = 0
    for s, n in sorted((s, n) for n, s in zip(size, stride, strict=True) if n > 1):
        if s == 0:
            return True
        if s <= reach:
            break
        reach += s * (n - 1)
    else:
        return False
    places = np.zeros((), np.int64)
    for n, s in zip(size, stride, strict=True):
        places = np.add.outer(places, np.arange(n) * s)
    return np.unique(places).size < places.size
