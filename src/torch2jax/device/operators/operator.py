"""A call of an operator: its program is found by the arguments, run, and its results wrapped.

In eager mode a program is one cached ``jax.jit`` function, keyed by the operator, its arguments
that are not tensors, and dtypes and view chains of those that are. Where an operand is a tracer
the program runs as it is. What is computed while a trace is under way: see ``constants``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import torch
from jax.core import Tracer

from ..._compat.jax import ArrayImpl, trace_state_clean
from ..._conversions.dtypes import x64_enabled
from ...lowerings.registry import DataDependentShape
from .. import random_streams
from ..tensors.tensor import (
    Tensor,
    ValueNeeded,
    captures,
    read_cell,
    refuse_overlap,
    replace,
    to_torch,
    wrap,
)
from ..thread_state import state
from .constants import is_large, keep_recipe, value_of
from .operands import cells_of, flatten, items_meet, note_read
from .program import NoDecompositionHere, OperatorProgram
from .route import Route

__all__ = ["Operator"]


class Operator:
    """An operator whose results have memory of their own."""

    def __init__(self, func: Any) -> None:
        self.func = func
        self.route = Route(func)
        self.programs: dict[Any, OperatorProgram] = {}
        self.looks_at_values = False
        lowered = self.route.lowered
        self.compiles = lowered is not None and not lowered.eager
        # Of what takes a device, these alone read the values of tensors.
        self.reads_ends = func._opname in ("linspace", "logspace")
        self.in_lists = self.route.writes_several and "::_foreach" in func.name()

    def __call__(self, args: Any, kwargs: Any) -> Any:
        route = self.route
        if kwargs:
            device = kwargs.get("device")
            if device is not None and device.type not in ("jax", "lazy"):
                if not self.reads_ends:
                    return self._elsewhere(device, args, kwargs)
                ours = [a for a in args if type(a) is Tensor]
                if not any(isinstance(a._cell.array, Tracer) for a in ours):
                    there = [to_torch(a) if type(a) is Tensor else a for a in args]
                    return self.func(*there, **kwargs)
                kwargs = {**kwargs, "device": torch.device("jax")}
        if self.in_lists and len(args[0]) > 1 and items_meet(_lists(args)):
            return self._in_turn(args, kwargs)
        if route.decomposition is None:
            return self._call(args, kwargs)
        if route.target in state.active:
            raise NoDecompositionHere
        if route.returns_values:
            return route.decomposition(*args, **kwargs)
        try:
            return self._call(args, kwargs)
        except NoDecompositionHere:
            if route.target in state.active:
                raise
            route.to_bridge()
            self.programs = {}
            return self._call(args, kwargs)

    def _elsewhere(self, device: torch.device, args: Any, kwargs: Any) -> Any:
        """``zeros_like(x, device="cpu")``: a tensor of another device, like one of ours."""

        def like(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

        return self.func(*[like(a) for a in args], **kwargs)

    def _in_turn(self, args: Any, kwargs: Any) -> None:
        """``_foreach_add_([a, a], 1)``: an item sees what was written for those before it."""
        for i in range(len(args[0])):
            self.func(*[_item(a, i) for a in args], **kwargs)

    def _call(self, args: Any, kwargs: Any) -> Any:
        route = self.route
        if state.events is not None and not state.composite:
            state.events.add(self.func, route.kind)
        key, operands = self._key(args, kwargs)
        program = self.programs.get(key)
        if program is None:
            given = {k: v for k, v in kwargs.items() if k != "generator"}
            program = self.programs[key] = OperatorProgram(route, args, given, operands)
        for slot in program.views_written:
            refuse_overlap(operands[slot], route.fills)
        if captures:
            note_read(operands)
        traced = False
        arrays = []
        for x in operands:
            if type(x) is Tensor:
                a = x._cell.array
                if type(a) is not ArrayImpl and isinstance(a, Tracer):
                    traced = True
                elif x._chain is not None:
                    a = x._chain.operand(a)
            else:
                a = x
            arrays.append(a)
        words = None
        if route.random:
            words = random_streams.next_words(kwargs.get("generator"))
            traced = traced or isinstance(words, Tracer)
            arrays.append(words)
        if state.factories_traced and not (route.random or _has_tensors(operands)):
            traced = traced or is_large(program, operands)
        if traced:
            return self._call_traced(program, operands, words)
        if self.compiles:
            if trace_state_clean():
                out, bases = program.jitted(*arrays)
                return self._wrapped(program, operands, out, bases, False)
            with jax.ensure_compile_time_eval():
                if route.random or _has_tensors(operands):
                    out, bases = program.jitted(*arrays)
                else:  # soon made, where a compilation takes some 20 ms
                    out, bases = program.run(*operands)
            return self._wrapped(program, operands, out, bases, True)
        if route.kind == "decomposed":
            result = self._call_decomposed(program, operands, arrays)
            return route.decomposition(*args, **kwargs) if result is _VALUES else result
        return self._call_concrete(program, operands)

    def _key(self, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        """What selects the program of a call, and its operands."""
        route = self.route
        operands: list[Any] = []
        key: list[Any] = [x64_enabled(), torch.get_default_dtype()]
        for a, scalars in zip(args, route.scalars, strict=False):
            flatten(a, operands, key, scalars)
        for name, a in kwargs.items():
            if name != "generator":
                key.append(name)
                flatten(a, operands, key, route.scalar(name))
        if route.writes_several:  # which may be views of one cell
            key += cells_of(operands)
        return tuple(key), operands

    def plan(self, args: Any, kwargs: Any) -> Any:
        """How calls like this one, which has been made, are repeated; None: they are not.

        Such a plan stands for ``_call`` where nothing is traced: see ``dispatch``.
        """
        key, operands = self._key(args, kwargs)
        program = self.programs.get(key)
        if program is None or program.outs:
            return None
        if self.in_lists and len(set(program.cells)) < len(operands):
            return None  # whether items meet, is to be asked each time
        returned = -1  # the results of the program
        if program.mutated and (self.route.returns_mutated or not self.route.returns):
            returned = self.route.returns
        if returned > len(program.mutated) or (returned < 0 and not program.torch_dtypes):
            return None
        return (
            program,
            program.jitted,
            tuple(program.torch_dtypes),
            tuple(program.mutated),
            tuple(program.views_written),
            returned,
        )

    def _call_decomposed(self, program: OperatorProgram, operands: Any, arrays: Any) -> Any:
        """One compiled program; step by step where the decomposition looks at values."""
        if self.looks_at_values:
            return _VALUES
        before, state.compiling = state.compiling, True
        clean = trace_state_clean()
        try:
            with _NOTHING if clean else jax.ensure_compile_time_eval():
                out, bases = program.jitted(*arrays)
        except (ValueNeeded, DataDependentShape):
            if self.route.mutable:
                raise
            self.looks_at_values = True
            return _VALUES
        finally:
            state.compiling = before
        return self._wrapped(program, operands, out, bases, not clean)

    def _call_traced(self, program: OperatorProgram, operands: list[Any], words: Any) -> Any:
        values = [value_of(x) if type(x) is Tensor else x for x in operands]
        out, new = program.compute(values, words)
        slots = program.mutated
        if state.lowering and not torch.is_grad_enabled():
            out = jax.tree.map(jax.lax.stop_gradient, out)
            new = [_unseen(values[s], x) for s, x in zip(slots, new, strict=True)]
        for slot, value in zip(slots, new, strict=True):
            replace(operands[slot], value)
        return self._results(program, operands, out)

    def _call_concrete(self, program: OperatorProgram, operands: list[Any]) -> Any:
        """Without compiling: results whose shapes depend on values, and PyTorch's own kernels."""
        with jax.ensure_compile_time_eval():
            values = [read_cell(x, x._cell.array) if type(x) is Tensor else x for x in operands]
            out, new = program.compute(values, None)
        for slot, value in zip(program.mutated, new, strict=True):
            replace(operands[slot], value)
        return self._results(program, operands, out)

    # --- results

    def _wrapped(
        self,
        program: OperatorProgram,
        operands: list[Any],
        out: Any,
        bases: list[Any],
        recipes: bool,
    ) -> Any:
        """After a compiled program: its results, and new arrays in the cells it has written to."""
        for slot, base in zip(program.mutated, bases, strict=True):
            x = operands[slot]
            if x._chain is None and slot in program.outs:
                replace(x, base)
                continue
            x._cell.renew(base)
        made: list[Tensor] = []
        result = self._results(program, operands, out, made)
        if recipes and not bases:
            keep_recipe(made, program, operands)
        return result

    def _results(
        self,
        program: OperatorProgram,
        operands: list[Any],
        out: Any,
        made: list[Tensor] | None = None,
    ) -> Any:
        """What the operator returns; new tensors are appended to ``made``."""
        if program.mutated:
            n = self.route.returns
            if not n:
                return None
            if self.route.returns_mutated:  # of what is written to, the first
                found = [operands[slot] for slot in program.mutated]
                return found[0] if n == 1 else tuple(found[:n])
        if made is None:
            made = []
        return _tensors(out, program.torch_dtypes, made)


def _tensors(out: Any, dtypes: Sequence[torch.dtype], made: list[Tensor]) -> Any:
    """Results as tensors, in the structure in which they come."""
    if out is None:
        return None
    if isinstance(out, list | tuple):
        found = [_tensors(x, dtypes, made) for x in out]
        return found if type(out) is list else tuple(found)
    if type(out) is not ArrayImpl and not isinstance(out, jax.Array):
        out = jax.numpy.asarray(out)
    made.append(wrap(out, dtypes[min(len(made), len(dtypes) - 1)]))
    return made[-1]


def _item(a: Any, i: int) -> Any:
    if isinstance(a, torch.Tensor):  # of one number, or of one for each item
        return a[i : i + 1] if a.ndim else a
    return [a[i]] if isinstance(a, list | tuple) else a


def _lists(args: Any) -> list[Any]:
    return [a for a in args if isinstance(a, list | tuple)]


def _has_tensors(operands: list[Any]) -> bool:
    return any(type(x) is Tensor for x in operands)


_VALUES = object()
_NOTHING = contextlib.nullcontext()


@jax.custom_jvp
def _unseen(old: Any, new: Any) -> Any:
    """The values of a write under ``no_grad``: the derivative is still that of the old ones."""
    return new


@_unseen.defjvp
def _unseen_jvp(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]
