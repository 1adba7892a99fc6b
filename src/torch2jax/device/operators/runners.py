"""A runner carries out a program; each program gets its runner when it is made.

``run`` carries out a call where nothing is traced. ``trace`` carries out a call that becomes part
of the trace under way; it is the same for all programs.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import jax
import torch

from ..._compat.jax import trace_state_clean
from ...lowerings.registry import DataDependentShape
from ...lowerings.views import unseen
from ..tensors.tensor import Tensor, ValueNeeded, read_cell
from ..thread_state import state
from . import host, results
from .constants import asked_sizes, value_of
from .cut import cut
from .program import NoDecompositionHere, OperatorProgram

__all__ = ["Call", "Compiled", "Decomposed", "Runner", "StepByStep", "Uncompiled"]


@dataclass(slots=True)
class Call:
    """One call of an operator; ``arrays`` are what its program takes for the operands."""

    args: Any
    kwargs: Any
    operands: list[Any]
    arrays: list[Any]
    words: Any = None
    """The words of the key of an operator that draws random numbers."""


class Runner(ABC):
    """A runner carries out calls of ``op`` that have the program ``program``."""

    __slots__ = ("op", "program")

    def __init__(self, op: Any, program: OperatorProgram) -> None:
        self.op, self.program = op, program

    @abstractmethod
    def run(self, call: Call) -> Any:
        """Return the result of a call where nothing is traced."""

    def trace(self, call: Call) -> Any:
        """Return the result of a call that becomes part of the trace under way."""
        program, operands = self.program, call.operands
        values = [value_of(x) if type(x) is Tensor else x for x in operands]
        try:
            out, new = program.compute(values, call.words)
        except DataDependentShape:
            with jax.ensure_compile_time_eval():
                known = asked_sizes(operands)
                if known is None:
                    raise
                out, new = program.compute(known, call.words)
        constant = state.lowering and not torch.is_grad_enabled()
        if constant and not state.kept:
            out = jax.tree.map(cut, out)
            new = [unseen(values[s], x) for s, x in zip(program.mutated, new, strict=True)]
        result = results.of_arrays(program, operands, out, new)
        if constant and not program.mutated:
            for x in result if isinstance(result, list | tuple) else [result]:
                if type(x) is Tensor:
                    x._cut = True
        return result


class Compiled(Runner):
    """It runs one cached ``jax.jit`` function of an operator that has a lowering."""

    __slots__ = ("constant", "on_host")

    def __init__(self, op: Any, program: OperatorProgram) -> None:
        super().__init__(op, program)
        self.constant = not (program.route.random or program.has_tensors)
        """Whether the result depends on Python values alone."""
        self.on_host = host.fits(program)

    def run(self, call: Call) -> Any:
        program = self.program
        if trace_state_clean():
            out, cells = program.jitted(*call.arrays)
            return results.of_cells(program, call.operands, out, cells, False)
        with jax.ensure_compile_time_eval():
            found = host.compute(program, call.operands) if self.on_host else None
            if found is not None:
                out, cells = found[0], []
            elif self.constant:  # running it is quick, compiling takes some 20 ms
                out, cells = program.run(*call.operands)
            else:
                out, cells = program.jitted(*call.arrays)
        return results.of_cells(program, call.operands, out, cells, True)


class Uncompiled(Runner):
    """It compiles nothing: shapes of results depend on values, or PyTorch's own kernel runs."""

    __slots__ = ()

    def run(self, call: Call) -> Any:
        operands = call.operands
        with jax.ensure_compile_time_eval():
            values = [read_cell(x, x._cell.array) if type(x) is Tensor else x for x in operands]
            out, new = self.program.compute(values, None)
        return results.of_arrays(self.program, operands, out, new)


class Decomposed(Runner):
    """It runs a compiled decomposition. Where that fails, the operator goes another way."""

    __slots__ = ()

    def run(self, call: Call) -> Any:
        try:
            return self._compiled(call)
        except (ValueNeeded, DataDependentShape):
            if self.program.route.mutable:
                raise
            further = self._step_by_step
        except NoDecompositionHere:
            further = self._by_bridge
        return further(call)

    def trace(self, call: Call) -> Any:
        try:
            return super().trace(call)
        except NoDecompositionHere:
            pass
        return self._by_bridge(call)

    def _compiled(self, call: Call) -> Any:
        before, state.compiling = state.compiling, True
        clean = trace_state_clean()
        try:
            with _NOTHING if clean else jax.ensure_compile_time_eval():
                out, cells = self.program.jitted(*call.arrays)
        finally:
            state.compiling = before
        return results.of_cells(self.program, call.operands, out, cells, not clean)

    def _step_by_step(self, call: Call) -> Any:
        """Carry out this call and all further ones of the operator without compiling."""
        self.op.run_by(StepByStep)
        return StepByStep(self.op, self.program).run(call)

    def _by_bridge(self, call: Call) -> Any:
        """Carry out this call and all further ones by PyTorch's own kernel.

        A mixture of both would need a program for each.
        """
        self.op.route = self.program.route.bridged()
        self.op.run_by(Uncompiled)
        return self.op.carry_out(call.args, call.kwargs)


class StepByStep(Decomposed):
    """It calls the operators of a decomposition one by one, because that looks at values."""

    __slots__ = ()

    def run(self, call: Call) -> Any:
        try:
            return self.program.route.decomposition(*call.args, **call.kwargs)
        except NoDecompositionHere:
            pass
        return self._by_bridge(call)


_NOTHING = contextlib.nullcontext()
