"""From an operator and its tensors to a JAX program and new tensors.

An operator goes one of these routes, found once: the native lowering; PyTorch's decomposition, run
on tensors that hold tracers, so that it is one program as well; the operator itself through the
bridge. In eager mode a program is one cached ``jax.jit`` function, keyed by the operator, its
arguments that are not tensors, and dtypes and view chains of those that are; in-place operations
and writes to views are part of it. Where an operand is a tracer the route runs as it is.

NOTE [Constants of a trace]. While a trace is under way, operators of arrays (not tracers) run at
once: masks and index tables are Python values there. A large result that the traced program uses is
not embedded in it but made again inside, from its recipe.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax.core import Tracer
from torch.utils import _pytree as torch_tree
from torch.utils._python_dispatch import _disable_current_modes

from .._compat import ArrayImpl, trace_state_clean
from .._convert import j2t
from .._dtypes import dtype_j2t, x64_enabled
from .._errors import Torch2JaxError
from ..lowerings.registry import TABLE, DataDependentShape
from . import random
from .tensor import (
    Tensor,
    ValueNeeded,
    captures,
    from_torch,
    read_cell,
    wrap,
    wrap_view,
    write,
)
from .views import GETTERS, OTHER_ELEMENTS, ROOT, geometry

__all__ = ["Events", "dispatch", "forget", "lowering_scope", "recorded", "special"]

LARGE = 1 << 20
"""Bytes beyond which a constant of a trace is made again inside the program."""

SPECIAL: dict[Any, Callable[..., Any]] = {}
"""Operators that are more than a function of arrays: they take and return tensors."""


def special(*ops: Any) -> Callable[[Any], Any]:
    """Register a handler ``(args, kwargs) -> result`` of operators."""

    def register(fn: Any) -> Any:
        SPECIAL.update((op, fn) for op in ops if op is not None)
        return fn

    return register


class _State(threading.local):
    lowering = 0  # inside torch2jax(..., lower=True), whose derivatives are JAX's
    events: Any = None
    constants: Any = None  # tensors of other devices that the trace under way has met
    composite = 0  # inside a decomposition
    active: tuple[Any, ...] = ()
    compiling = False  # a decomposition for eager mode


state = _State()


@contextlib.contextmanager
def lowering_scope() -> Iterator[None]:
    """While PyTorch code runs on tracers whose derivatives JAX takes."""
    before, state.constants = state.constants, {}
    state.lowering += 1
    try:
        yield
    finally:
        state.lowering -= 1
        state.constants = before


def dispatch(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """``Tensor.__torch_dispatch__``."""
    op = _ops.get(func)
    if op is None:
        op = _ops[func] = _make_op(func)
    return op(args, kwargs or {})


_ops: dict[Any, Callable[[Any, Any], Any]] = {}


def forget() -> None:
    """Look lowerings up again."""
    _ops.clear()


def _make_op(func: Any) -> Callable[[Any, Any], Any]:
    from .. import lowerings  # noqa: F401  fills the table
    from . import specials  # noqa: F401

    if func in SPECIAL:
        return SPECIAL[func]
    if func in GETTERS:
        return _View(func)
    return _Op(func)


# --- what was done -------------------------------------------------------------------------------


class Events:
    """What happened to the operators of a call: ``(operator, route, line)`` with counts."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str, str], int] = {}

    def add(self, func: Any, route: str) -> None:
        key = (str(func), route, _line_of_user())
        self.counts[key] = self.counts.get(key, 0) + 1


@contextlib.contextmanager
def recorded() -> Iterator[Events]:
    before, state.events = state.events, Events()
    try:
        yield state.events
    finally:
        state.events = before


def _line_of_user() -> str:
    """``file:line`` of the innermost frame that is neither ours nor PyTorch's nor JAX's."""
    ours = __name__.split(".")[0]
    frame = sys._getframe(2)
    while frame is not None:
        root = frame.f_globals.get("__name__", "").split(".")[0]
        if root not in (ours, "torch", "jax", "jaxlib", "contextlib"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


# --- operands ------------------------------------------------------------------------------------


class _Slot:
    """The place of an operand in a template of arguments."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


def _flatten(x: Any, operands: list[Any], key: list[Any], scalars: bool) -> None:
    t = type(x)
    if t is Tensor:
        operands.append(x)
        key += (Tensor, x._chain, x.dtype)
    elif t is float or t is int:
        if scalars and (t is float or -(2**31) <= x < 2**31):
            operands.append(x)
            key.append(t)
        else:
            key += (t, x)
    elif t is list or t is tuple or isinstance(x, list | tuple):
        key += (list, len(x))
        for y in x:
            _flatten(y, operands, key, scalars)
    elif isinstance(x, torch.Tensor):
        x = _foreign(x)
        operands.append(x)
        key += (Tensor, None, x.dtype)
    else:
        key += (t, x)


def _cells(operands: Sequence[Any]) -> list[int]:
    """For each operand the first one with the same memory."""
    first: dict[int, int] = {}
    return [
        first.setdefault(id(x._cell if type(x) is Tensor else x), i) for i, x in enumerate(operands)
    ]


def _template(x: Any, count: list[int], scalars: bool) -> Any:
    """The arguments with a slot for each operand, in the order of ``_flatten``."""
    t = type(x)
    if (
        isinstance(x, torch.Tensor)
        or (t is float and scalars)
        or (t is int and scalars and -(2**31) <= x < 2**31)
    ):
        count[0] += 1
        return _Slot(count[0] - 1)
    if isinstance(x, list | tuple):
        return [_template(y, count, scalars) for y in x]
    return x


def _fill(x: Any, values: Sequence[Any]) -> Any:
    if type(x) is _Slot:
        return values[x.index]
    if type(x) is list:
        return [_fill(y, values) for y in x]
    return x


def _foreign(x: torch.Tensor) -> Tensor:
    """A tensor of another device: a number, or with ``lower=True`` a constant."""
    if isinstance(x, Tensor):
        return x
    if x.device.type == "meta" or type(x) not in _PLAIN:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, got one on {x.device} of type "
            f"{type(x).__name__} beside one on jax:0."
        )
    if x.ndim and not (state.lowering or _allow_foreign()):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, jax:0 "
            f'and {x.device}. Move the other one: tensor.to("jax").'
        )
    if x.ndim == 0 and x.dtype in (torch.float64, torch.complex128) and not x64_enabled():
        # Beside tensors it does not decide the dtype, and torch makes such numbers by itself.
        x = x.detach().to(torch.float32 if x.dtype is torch.float64 else torch.complex64)
    # Within one trace a constant that is used often is one constant; the tensor is kept for its id.
    cached = state.constants.get(id(x)) if state.lowering else None
    if cached is None or cached[0] is not x or cached[1] != x._version:
        cached = (x, x._version, from_torch(x))
        if state.lowering:
            state.constants[id(x)] = cached
    return wrap(cached[2], x.dtype)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _allow_foreign() -> bool:
    return foreign_ok.active > 0


class _ForeignOk(threading.local):
    active = 0


foreign_ok = _ForeignOk()


# --- one operator --------------------------------------------------------------------------------


class Program:
    """What an operator does for arguments of one kind: a function of arrays."""

    def __init__(self, op: _Op, args: Any, kwargs: Any, operands: Sequence[Any]) -> None:
        count = [0]
        scalars = op.scalars
        self.op = op
        self.args = [_template(a, count, scalars) for a in args]
        self.kwargs = {k: _template(a, count, scalars) for k, a in kwargs.items()}
        tensors = [x if type(x) is Tensor else None for x in operands]
        self.chains = [None if t is None else t._chain for t in tensors]
        self.dtypes = [t.dtype if t is not None else None for t in tensors]
        self.mutated = op.mutated_slots(self.args, self.kwargs)
        self.cells = _cells(operands)
        self.torch_dtypes: list[torch.dtype] = []
        self.jitted = jax.jit(self.run)

    def values(self, arrays: Sequence[Any]) -> list[Any]:
        return [a if c is None else c.get(a) for a, c in zip(arrays, self.chains, strict=True)]

    def run(self, *arrays: Any) -> tuple[Any, list[Any]]:
        """Results, and the new arrays of the cells that are written to. Traced."""
        key = None
        if self.op.random:
            key, arrays = arrays[-1], arrays[:-1]
        out, new = self.compute(self.values(arrays), key)
        latest: dict[int, Any] = {}
        for slot, value in zip(self.mutated, new, strict=True):
            chain, cell = self.chains[slot], self.cells[slot]
            base = latest.get(cell, arrays[slot])
            latest[cell] = value if chain is None else chain.set(base, value)
        return out, [latest[self.cells[slot]] for slot in self.mutated]

    def compute(self, values: list[Any], key: Any) -> tuple[Any, list[Any]]:
        """Results and new values of what is written to, from the values of all operands."""
        args, kwargs = (
            _fill(self.args, values),
            {k: _fill(v, values) for k, v in self.kwargs.items()},
        )
        out, new = self.op.route(self, args, kwargs, values, key)
        checked = []
        for slot, value in zip(self.mutated, new, strict=True):
            old, dtype = values[slot], self.dtypes[slot]
            assert dtype is not None
            if value.shape != old.shape:
                value = jax.numpy.broadcast_to(value, old.shape)
            if value.dtype != old.dtype:
                have = dtype_j2t(value.dtype)
                if not torch.can_cast(have, dtype):
                    raise RuntimeError(
                        f"result type {have} can't be cast to the desired output type {dtype}"
                    )
                value = jax.lax.convert_element_type(value, old.dtype)
            checked.append(value)
        return out, checked


class _NoDecompositionHere(Exception):
    """A decomposition does not cover these arguments, or calls its own operator."""


class _Op:
    """An operator whose results have memory of their own."""

    def __init__(self, func: Any) -> None:
        self.func = func
        schema = func._schema
        self.names = [a.name for a in schema.arguments]
        self.mutable = [
            a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
        ]
        self.outs = [
            a.name
            for a in schema.arguments
            if a.is_out and a.alias_info is not None and a.alias_info.is_write
        ]
        self.writes_several = len(self.mutable) > 1 or any(
            a.name in self.mutable and "List" in str(a.type) for a in schema.arguments
        )
        self.returns_mutated = bool(schema.returns) and all(
            r.alias_info is not None for r in schema.returns
        )
        self.target, self.drop = func, ()
        if self.mutable:
            functional = _functional_of(func, self.outs)
            if functional is not None:
                self.target, self.drop = functional, tuple(self.outs)
        self.pure = self.target is not func or not self.mutable
        self.kind: str
        self._fn: Any
        self.kind, self._fn = _find_route(self.target)
        lowered = self._fn if self.kind == "native" else None
        self.scalars = lowered is not None and lowered.scalars
        self.random = lowered is not None and lowered.random
        self.programs: dict[Any, Program] = {}
        self.looks_at_values = False
        # A result that is a Python value is read from tensors: there is nothing to compile.
        self.returns_values = self.kind == "decomposed" and any(
            "Tensor" not in str(r.type) for r in schema.returns
        )

    def mutated_slots(self, args: Any, kwargs: Any) -> list[int]:
        found: list[int] = []
        for name in self.mutable:
            i = self.names.index(name)
            x = kwargs.get(name) if name in kwargs else (args[i] if i < len(args) else None)
            found += [s.index for s in (x if isinstance(x, list) else [x]) if type(s) is _Slot]
        return found

    # --- a call

    def __call__(self, args: Any, kwargs: Any) -> Any:
        if self.kind == "decomposed" and self.target in state.active:
            raise _NoDecompositionHere
        if self.returns_values:
            return self._fn(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None and device.type not in ("jax", "lazy"):
            return self._elsewhere(device, args, kwargs)
        try:
            return self._call(args, kwargs)
        except _NoDecompositionHere:
            if self.target in state.active:
                raise
            # For this operator from now on; a mixture would need a program for each.
            self.kind, self._fn, self.programs = "bridge", None, {}
            return self._call(args, kwargs)

    def _elsewhere(self, device: torch.device, args: Any, kwargs: Any) -> Any:
        """``zeros_like(x, device="cpu")``: a tensor of another device, like one of ours."""

        def like(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

        return self.func(*[like(a) for a in args], **kwargs)

    def _call(self, args: Any, kwargs: Any) -> Any:
        operands: list[Any] = []
        key: list[Any] = []
        scalars = self.scalars
        generator = None
        if "generator" in kwargs:
            kwargs = dict(kwargs)
            generator = kwargs.pop("generator")
        for a in args:
            if type(a) is Tensor:
                operands.append(a)
                key += (Tensor, a._chain, a.dtype)
            else:
                _flatten(a, operands, key, scalars)
        for name in kwargs:
            key.append(name)
            _flatten(kwargs[name], operands, key, scalars)
        if state.events is not None and not state.composite:
            state.events.add(self.func, self.kind)
        if self.writes_several:  # which may be views of one cell
            key += _cells(operands)
        hashed = (x64_enabled(), *key)
        program = self.programs.get(hashed)
        if program is None:
            program = self.programs[hashed] = Program(self, args, kwargs, operands)
        traced = False
        arrays = []
        if captures:
            note_read(operands)
        for x in operands:
            a = x._cell.array if type(x) is Tensor else x
            arrays.append(a)
            if type(a) is not ArrayImpl and isinstance(a, Tracer):
                traced = True
        words = None
        if self.random:
            words = random.next_words(generator)
            traced = traced or isinstance(words, Tracer)
        if traced:
            return self._call_traced(program, operands, words)
        if self.kind == "bridge" or (self.kind == "native" and self._fn.eager):
            return self._call_concrete(program, operands)
        if words is not None:
            arrays.append(words)
        if self.kind == "decomposed":
            result = self._call_decomposed(program, operands, arrays, args, kwargs)
            if result is not _VALUES:
                return result
            return self._fn(*args, **kwargs)
        if trace_state_clean():
            out, bases = program.jitted(*arrays)
            recipes = False
        else:
            with jax.ensure_compile_time_eval():
                # What has no operands is soon made; a compilation takes some 20 ms.
                out, bases = (program.jitted if arrays else program.run)(*arrays)
            recipes = True
        return self._wrapped(program, operands, out, bases, recipes)

    def _call_decomposed(
        self, program: Program, operands: Any, arrays: Any, args: Any, kwargs: Any
    ) -> Any:
        """One compiled program; step by step where the decomposition looks at values."""
        if self.looks_at_values:
            return _VALUES
        before, state.compiling = state.compiling, True
        try:
            with jax.ensure_compile_time_eval():
                out, bases = program.jitted(*arrays)
        except (ValueNeeded, DataDependentShape):
            if self.mutable:
                raise
            self.looks_at_values = True
            return _VALUES
        finally:
            state.compiling = before
        return self._wrapped(program, operands, out, bases, not trace_state_clean())

    def _wrapped(
        self, program: Program, operands: list[Any], out: Any, bases: list[Any], recipes: bool
    ) -> Any:
        slots = program.mutated
        if slots:
            for slot, base in zip(slots, bases, strict=True):
                cell = operands[slot]._cell
                cell.array = base
                cell.version += 1
                cell.recipe = None
            if self.returns_mutated:
                n = len(self.func._schema.returns)  # of what is written to, the first
                found = [operands[slot] for slot in slots]
                return found[0] if n == 1 else tuple(found[:n])
            if not self.func._schema.returns:
                return None
        if isinstance(out, jax.Array):
            t = wrap(out, program.torch_dtypes[0])
            if recipes and out.nbytes > LARGE and not slots:
                t._cell.recipe = (program, [_snapshot(x) for x in operands], None)
            return t
        wrapped = _Wrapper(program.torch_dtypes)
        result = wrapped(out)
        if recipes and not slots:
            for index, t in enumerate(wrapped.made):
                if t._cell.array.nbytes > LARGE:
                    t._cell.recipe = (program, [_snapshot(x) for x in operands], index)
        return result

    def _call_traced(self, program: Program, operands: list[Any], words: Any) -> Any:
        values = [value_of(x) if type(x) is Tensor else x for x in operands]
        out, new = program.compute(values, words)
        slots = program.mutated
        if state.lowering and not torch.is_grad_enabled():
            out = jax.tree.map(jax.lax.stop_gradient, out)
            new = [_unseen(values[s], x) for s, x in zip(slots, new, strict=True)]
        for slot, value in zip(slots, new, strict=True):
            write(operands[slot], value)
        if slots:
            return self._wrapped(
                program, operands, out, [operands[s]._cell.array for s in slots], False
            )
        return _Wrapper(program.torch_dtypes)(out)

    def _call_concrete(self, program: Program, operands: list[Any]) -> Any:
        """Without compiling: results whose shapes depend on values, and PyTorch's own kernels."""
        with jax.ensure_compile_time_eval():
            values = [read_cell(x, x._cell.array) if type(x) is Tensor else x for x in operands]
            out, new = program.compute(values, None)
        for slot, value in zip(program.mutated, new, strict=True):
            write(operands[slot], value)
        bases = [operands[slot]._cell.array for slot in program.mutated]
        return self._wrapped(program, operands, out, bases, False)

    # --- the routes: results, and new values of what is written to

    def route(self, program: Program, args: Any, kwargs: Any, values: Any, key: Any) -> Any:
        if self.kind == "native":
            out = self._native(args, kwargs, key)
            program.torch_dtypes = _dtypes_of(out, self, program, args, kwargs, values)
        elif self.kind == "decomposed":
            out, new = self._decomposed(program, values)
            if new is not None:
                return out, new
        else:
            out, new = self._bridged(program, values)
            if new is not None:
                return out, new
        if not self.mutable:
            return out, []
        if self.returns_mutated or not self.func._schema.returns:
            return None, jax.tree.leaves(out)[: len(program.mutated)]
        # The functional form returns what is written to after the results.
        n = len(self.func._schema.returns)
        program.torch_dtypes = program.torch_dtypes[:n]
        return (out[0] if n == 1 else tuple(out[:n])), list(out[n:])

    def _native(self, args: Any, kwargs: Any, key: Any) -> Any:
        kwargs = {k: v for k, v in kwargs.items() if k not in self.drop and k not in _IGNORED}
        if "device" in self.names:
            kwargs.pop("device", None)
        if self._fn.random:
            return self._fn.fn(key, *args, **kwargs)
        return self._fn.fn(*args, **kwargs)

    def _decomposed(self, program: Program, values: Any) -> tuple[Any, list[Any] | None]:
        """Through a function of tensors, here tensors that hold the values."""
        tensors = [
            v if d is None else wrap(v, d) for v, d in zip(values, program.dtypes, strict=True)
        ]
        args = _fill(program.args, tensors)
        kwargs = {k: _fill(v, tensors) for k, v in program.kwargs.items() if k not in self.drop}
        before = state.active
        state.active = (*before, self.target)
        state.composite += 1
        try:
            out = self._fn(*args, **kwargs)
        finally:
            state.composite -= 1
            state.active = before
        if out is NotImplemented:
            raise _NoDecompositionHere
        leaves = [x for x in torch_tree.tree_leaves(out) if x is not None]
        program.torch_dtypes = [
            x.dtype if isinstance(x, torch.Tensor) else _PYTHON[type(x)] for x in leaves
        ]
        arrays = jax.tree.map(_array_of, out, is_leaf=lambda x: isinstance(x, torch.Tensor))
        if self.mutable and not self.pure:
            new = [value_of(tensors[slot]) for slot in program.mutated]
            return (None if self.returns_mutated else arrays), new
        return arrays, None

    def _bridged(self, program: Program, values: Any) -> tuple[Any, list[Any] | None]:
        """The operator itself, on PyTorch's own tensors."""
        target, drop, pure = self.target, self.drop, self.pure
        spots = [i for i, d in enumerate(program.dtypes) if d is not None]
        seen: list[list[torch.dtype]] = []

        def run(*tensors: torch.Tensor) -> Any:
            full = list(values)
            for i, t in zip(spots, tensors, strict=True):
                full[i] = t.clone() if not pure and i in program.mutated else t
            args = _fill(program.args, full)
            kwargs = {k: _fill(v, full) for k, v in program.kwargs.items() if k not in drop}
            if "device" in kwargs:
                kwargs["device"] = "cpu"
            out = target(*args, **kwargs)
            if self.returns_mutated:
                out = None
            seen.append([x.dtype for x in torch_tree.tree_leaves(out) if x is not None])
            return out if pure else (out, [full[slot] for slot in program.mutated])

        tensors = [values[i] for i in spots]
        dtypes = [program.dtypes[i] for i in spots]
        if any(isinstance(t, Tracer) for t in tensors):
            from .._wrap import torch2jax

            if torch.Tag.dynamic_output_shape in target.tags:
                raise DataDependentShape(_DATA_DEPENDENT.format(self.func))
            out = torch2jax(run, arg_dtypes=tuple(dtypes))(*tensors)
        else:
            with torch.no_grad(), _disable_current_modes():
                host = [j2t(np.asarray(t)).to(d) for t, d in zip(tensors, dtypes, strict=True)]
                results = run(*host)
                out = torch_tree.tree_map(
                    lambda x: from_torch(x) if isinstance(x, torch.Tensor) else x, results
                )
        program.torch_dtypes = seen[-1] if seen else program.torch_dtypes
        return (out, None) if pure else (out[0], list(out[1]))


@jax.custom_jvp
def _unseen(old: Any, new: Any) -> Any:
    """The values of a write under ``no_grad``: the derivative is still that of the old ones."""
    return new


@_unseen.defjvp
def _unseen_jvp(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]


def note_read(operands: Sequence[Any]) -> None:
    """What ``device.jit`` traces sees memory from before as an input, not as a constant."""
    for x in operands:
        if type(x) is Tensor:
            for capture in captures:
                capture.read(x._cell)


_VALUES = object()
_PYTHON = {bool: torch.bool, int: torch.int64, float: torch.float32, complex: torch.complex64}
_IGNORED = ("layout", "pin_memory", "memory_format", "non_blocking")
_DATA_DEPENDENT = (
    "the shape of the result of {} depends on the values of a tensor that is being traced, and XLA "
    "must know shapes when it compiles. Use a result of fixed size (torch.where with a mask, "
    "padding), or run this line outside of the traced function."
)


class _Wrapper:
    """Results as tensors, in the structure in which they come."""

    def __init__(self, dtypes: Sequence[torch.dtype]) -> None:
        self.dtypes = dtypes
        self.made: list[Tensor] = []

    def __call__(self, out: Any) -> Any:
        if out is None:
            return None
        if isinstance(out, list | tuple):
            return type(out)([self(x) for x in out]) if type(out) is list else tuple(map(self, out))
        if not isinstance(out, jax.Array):
            out = jax.numpy.asarray(out)
        dtype = self.dtypes[min(len(self.made), len(self.dtypes) - 1)]
        self.made.append(wrap(out, dtype))
        return self.made[-1]


def _array_of(x: Any) -> Any:
    if isinstance(x, Tensor):
        return value_of(x)
    if isinstance(x, torch.Tensor):
        return from_torch(x)
    return x


def _snapshot(x: Any) -> Any:
    """An operand as it is now, for a recipe."""
    return (x._cell.array, x._cell.recipe, x._chain) if type(x) is Tensor else x


def value_of(t: Tensor) -> Any:
    """The values of a tensor as an operand of a traced operator."""
    cell = t._cell
    if cell.recipe is None or isinstance(cell.array, Tracer):
        return read_cell(t, cell.array)
    made = _made(cell.recipe)
    return made if t._chain is None else t._chain.get(made)


def _made(recipe: Any) -> Any:
    """A large constant, computed inside the program that is being traced."""
    program, operands, index = recipe
    arrays = []
    for x in operands:
        if isinstance(x, tuple):
            array, inner, _ = x
            arrays.append(array if inner is None else _made(inner))
        else:
            arrays.append(x)
    out, _ = program.run(*arrays)
    return out if index is None else jax.tree.leaves(out)[index]


# --- where an operator goes ----------------------------------------------------------------------


def _functional_of(func: Any, outs: Sequence[str]) -> Any:
    """The operator of the same meaning that writes to nothing; None where there is none."""
    namespace, _, name = func._schema.name.partition("::")
    space = getattr(torch.ops, namespace)
    arguments = [a for a in func._schema.arguments if a.name not in outs]
    name = name if outs else name.removesuffix("_")
    if not outs and name == func._schema.name.partition("::")[2]:
        return None
    for candidate in (name, f"{name}_functional", f"{name}_copy"):
        packet = getattr(space, candidate, None)
        for which in packet.overloads() if packet is not None else ():
            other = getattr(packet, which)
            if any(a.alias_info is not None for a in other._schema.arguments):
                continue
            theirs = other._schema.arguments
            if [(a.name, str(a.type)) for a in theirs] == [
                (a.name, str(a.type)) for a in arguments
            ]:
                return other
    return None


def _find_route(func: Any) -> tuple[str, Any]:
    if func in TABLE:
        return "native", TABLE[func]
    if hasattr(func, "impl_aten") and func.namespace == "prims":
        return "decomposed", func.impl_aten
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch._decomp import decomposition_table
    if func in decomposition_table and func not in _BAD_DECOMPOSITIONS:
        return "decomposed", decomposition_table[func]
    if func._can_decompose():
        return "decomposed", func.decompose
    name, explicit = func.name(), "CompositeExplicitAutograd"
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, explicit) and (
        func.namespace == "aten" and name not in _TOUCH_MEMORY
    ):
        key = torch._C.DispatchKey.CompositeExplicitAutograd
        return "decomposed", lambda *a, **k: func._op_dk(key, *a, **k)
    return "bridge", None


_BAD_DECOMPOSITIONS: set[Any] = set()
_TOUCH_MEMORY: set[str] = set()


def _dtypes_of(
    out: Any, op: _Op, program: Program, args: Any, kwargs: Any, values: Any
) -> list[torch.dtype]:
    """PyTorch's dtypes of the results. An int32 array stands for int64 too while x64 is off."""
    leaves = [x if hasattr(x, "dtype") else np.asarray(x) for x in jax.tree.leaves(out)]
    found = [dtype_j2t(x.dtype) for x in leaves]
    if x64_enabled() or torch.int32 not in found:
        return found
    narrow = torch.int64
    if op._fn.int32 or torch.int32 in (*args, *kwargs.values()):
        narrow = torch.int32
    elif torch.int64 in (*args, *kwargs.values()):
        narrow = torch.int64
    elif torch.int32 in program.dtypes:
        asked = _asked(op.target, program, values, op.drop)
        if asked is not None and len(asked) == len(found):
            return asked
        ints = [d for d in program.dtypes if d in (torch.int32, torch.int64)]
        narrow = torch.int32 if all(d is torch.int32 for d in ints) else torch.int64
    return [narrow if d is torch.int32 else d for d in found]


def _asked(
    target: Any, program: Program, values: Any, drop: Sequence[str]
) -> list[torch.dtype] | None:
    """What PyTorch says of the dtypes of an operator's results, asked with meta tensors."""
    metas = [
        v if d is None else torch.empty(v.shape, dtype=d, device="meta")
        for v, d in zip(values, program.dtypes, strict=True)
    ]
    metas = [0 if isinstance(v, Tracer) else v for v in metas]  # a number
    kwargs = {k: _fill(v, metas) for k, v in program.kwargs.items() if k not in drop}
    if "device" in kwargs:
        kwargs["device"] = "meta"
    try:
        with _disable_current_modes():
            out = target(*_fill(program.args, metas), **kwargs)
    except Exception:  # it has no kernel for meta tensors
        return None
    return [x.dtype for x in torch_tree.tree_leaves(out) if isinstance(x, torch.Tensor)]


# --- views ---------------------------------------------------------------------------------------


def _frozen(x: Any) -> Any:
    return tuple(map(_frozen, x)) if isinstance(x, list | tuple) else x


class _View:
    """An operator whose results share the memory of its operand."""

    def __init__(self, func: Any) -> None:
        self.func = func
        self.names = [a.name for a in func._schema.arguments]
        self.strided = func is torch.ops.aten.as_strided.default
        self.plain = func in (torch.ops.aten.alias.default, torch.ops.aten.detach.default)
        self.detach = func is torch.ops.aten.detach.default

    def __call__(self, args: Any, kwargs: Any) -> Any:
        x: Any = args[0]
        if type(x) is not Tensor:
            return self.func(_foreign(x), *args[1:], **kwargs)
        if state.events is not None and not state.composite:
            state.events.add(self.func, "native")
        rest = tuple(_frozen(a) for a in args[1:])
        if kwargs:
            rest = self._positional(rest, kwargs)
        chain = x._chain
        size, stride, offset = tuple(x.shape), x.stride(), int(x.storage_offset())
        if self.plain:
            if self.detach and state.lowering and isinstance(x._cell.array, Tracer):
                chain = (chain or ROOT).then(self.func, ())
            return wrap_view(x, chain, x.dtype, size, stride, offset)
        found = geometry(self.func, rest, x.dtype, size, stride, offset)
        if self.strided:
            return self._as_strided(x, rest, found)
        base = chain or ROOT
        if type(found) is list:
            return [
                wrap_view(x, base.then(self.func, rest, i), *where) for i, where in enumerate(found)
            ]
        return wrap_view(x, base.then(self.func, rest), *found)

    def _positional(self, rest: tuple[Any, ...], kwargs: Any) -> tuple[Any, ...]:
        """Arguments by position, with PyTorch's defaults between."""
        full = list(rest)
        for argument in self.func._schema.arguments[1 + len(rest) :]:
            full.append(_frozen(kwargs.get(argument.name, argument.default_value)))
        return tuple(full)

    def _as_strided(self, x: Any, rest: Any, found: Any) -> Any:
        """It addresses the memory itself, whatever part of it the operand sees."""
        offset = rest[2] if len(rest) > 2 and rest[2] is not None else x.storage_offset()
        steps = x._chain.steps if x._chain is not None else ()
        if any(s.op in OTHER_ELEMENTS for s in steps):
            raise Torch2JaxError(
                "as_strided of a view with another dtype is not supported on device jax; clone() "
                "the view first."
            )
        chain = ROOT.then(self.func, (rest[0], rest[1], offset))
        return wrap_view(x, chain, *found)


Tensor.__torch_dispatch__ = classmethod(dispatch)  # type: ignore[assignment]
