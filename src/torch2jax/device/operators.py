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

from .._compat import ArrayImpl, trace_state_clean
from .._dtypes import x64_enabled
from ..lowerings.registry import DataDependentShape
from . import random
from .constants import is_large, keep_recipe, value_of
from .operands import cells_of, flatten, note_read
from .program import NoDecompositionHere, Program
from .routes import Route
from .state import state
from .tensor import Tensor, ValueNeeded, captures, read_cell, refuse_overlap, replace, wrap

__all__ = ["Operator"]


class Operator:
    """An operator whose results have memory of their own."""

    def __init__(self, func: Any) -> None:
        self.func = func
        self.route = Route(func)
        self.programs: dict[Any, Program] = {}
        self.looks_at_values = False
        lowered = self.route.lowered
        self.compiles = lowered is not None and not lowered.eager

    def __call__(self, args: Any, kwargs: Any) -> Any:
        route = self.route
        if kwargs:
            device = kwargs.get("device")
            if device is not None and device.type not in ("jax", "lazy"):
                return self._elsewhere(device, args, kwargs)
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

    def _call(self, args: Any, kwargs: Any) -> Any:
        route = self.route
        scalars = route.scalars
        x64 = x64_enabled()
        operands: list[Any] = []
        key: list[Any] = [x64, torch.get_default_dtype()]
        generator = None
        for i, a in enumerate(args):
            if type(a) is Tensor:
                operands.append(a)
                chain = a._chain
                key += (Tensor, None if chain is None else chain.pattern, a.dtype)
            else:
                flatten(a, operands, key, scalars[i])
        if kwargs:
            if "generator" in kwargs:
                kwargs = dict(kwargs)
                generator = kwargs.pop("generator")
            for name in kwargs:
                key.append(name)
                flatten(kwargs[name], operands, key, route.scalar(name))
        if state.events is not None and not state.composite:
            state.events.add(self.func, route.kind)
        if route.writes_several:  # which may be views of one cell
            key += cells_of(operands)
        hashed = tuple(key)
        program = self.programs.get(hashed)
        if program is None:
            program = self.programs[hashed] = Program(route, args, kwargs, operands)
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
                a = _numbers.get((x64, type(x), x), x)
            arrays.append(a)
        words = None
        if route.random:
            words = random.next_words(generator)
            traced = traced or isinstance(words, Tracer)
            arrays.append(words)
        if state.factories_traced and not (route.random or _has_tensors(operands)):
            traced = traced or is_large(program, operands)
        if traced:
            return self._call_traced(program, operands, words)
        if self.compiles:
            if trace_state_clean():
                _remember_numbers(arrays, x64)
                out, bases = program.jitted(*arrays)
                if type(out) is ArrayImpl and not bases:
                    return wrap(out, program.torch_dtypes[0])
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

    def _call_decomposed(self, program: Program, operands: Any, arrays: Any) -> Any:
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

    def _call_traced(self, program: Program, operands: list[Any], words: Any) -> Any:
        values = [value_of(x) if type(x) is Tensor else x for x in operands]
        out, new = program.compute(values, words)
        slots = program.mutated
        if state.lowering and not torch.is_grad_enabled():
            out = jax.tree.map(jax.lax.stop_gradient, out)
            new = [_unseen(values[s], x) for s, x in zip(slots, new, strict=True)]
        for slot, value in zip(slots, new, strict=True):
            replace(operands[slot], value)
        return self._results(program, operands, out)

    def _call_concrete(self, program: Program, operands: list[Any]) -> Any:
        """Without compiling: results whose shapes depend on values, and PyTorch's own kernels."""
        with jax.ensure_compile_time_eval():
            values = [read_cell(x, x._cell.array) if type(x) is Tensor else x for x in operands]
            out, new = program.compute(values, None)
        for slot, value in zip(program.mutated, new, strict=True):
            replace(operands[slot], value)
        return self._results(program, operands, out)

    # --- results

    def _wrapped(
        self, program: Program, operands: list[Any], out: Any, bases: list[Any], recipes: bool
    ) -> Any:
        """After a compiled program: its results, and new arrays in the cells it has written to."""
        for slot, base in zip(program.mutated, bases, strict=True):
            x = operands[slot]
            if x._chain is None and slot in program.outs:
                replace(x, base)
                continue
            cell = x._cell
            cell.array, cell.recipe = base, None
            cell.version += 1
        made: list[Tensor] = []
        result = self._results(program, operands, out, made)
        if recipes and not bases:
            keep_recipe(made, program, operands)
        return result

    def _results(
        self, program: Program, operands: list[Any], out: Any, made: list[Tensor] | None = None
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


def _has_tensors(operands: list[Any]) -> bool:
    return any(type(x) is Tensor for x in operands)


_VALUES = object()
_NOTHING = contextlib.nullcontext()

_numbers: dict[Any, Any] = {}
"""Numbers that have been operands, as arrays: a Python number costs its call 1 µs more."""


def _remember_numbers(arrays: list[Any], x64: bool) -> None:
    for i, x in enumerate(arrays):
        # Not 0.0, which equals -0.0, and not NaN, which is never found again.
        if (type(x) is float and x and x == x) or type(x) is int:
            if len(_numbers) > 4096:
                _numbers.clear()
            arrays[i] = _numbers[x64, type(x), x] = jax.numpy.asarray(x)


@jax.custom_jvp
def _unseen(old: Any, new: Any) -> Any:
    """The values of a write under ``no_grad``: the derivative is still that of the old ones."""
    return new


@_unseen.defjvp
def _unseen_jvp(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]
