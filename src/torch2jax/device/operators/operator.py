"""A call of an operator finds its program by the arguments, and its runner carries it out.

In eager mode a program is one cached ``jax.jit`` function, keyed by the operator, its arguments
that are not tensors, and dtypes and view chains of those that are. Where an operand is a tracer
the program runs as it is. ``constants`` says what is computed while a trace is under way.
"""

from __future__ import annotations

from typing import Any

import torch
from jax.core import Tracer
from torch.utils import _pytree as torch_tree

from ..._compat.jax import ArrayImpl
from ..._compat.torch import in_backward_pass
from ..._conversions.dtypes import x64_enabled
from ..._conversions.float64 import admit, narrow_number
from ..._errors import Torch2JaxError
from .. import random_streams
from ..tensors.tensor import Tensor, captures, refuse_overlap, sort_of, to_torch
from ..thread_state import state
from .constants import is_large
from .operands import cells_of, items_meet, note_read, read_argument
from .parameters import refuse_parameters
from .program import NoDecompositionHere, OperatorProgram
from .route import Route
from .runners import Call, Compiled, Decomposed, Runner, Uncompiled

__all__ = ["Operator"]


class Operator:
    """An operator object carries out an operator whose results have memory of their own."""

    def __init__(self, func: Any) -> None:
        self.func = func
        self.route = Route(func)
        self._runners: dict[Any, Runner] = {}
        self._runner_type = _runner_type(self.route)
        # Among the operators with a device argument, only these read values of tensors.
        self._reads_ends = func._opname in ("linspace", "logspace")
        self._in_lists = self.route.writes_several and "::_foreach" in func.name()

    def __call__(self, args: Any, kwargs: Any) -> Any:
        route = self.route
        if route.generator is not None:
            at = route.generator
            if len(args) > at:  # some operators take it by position too
                args, kwargs = args[:at], {**kwargs, "generator": args[at]}
            if kwargs.get("generator") is not None and not route.random:
                raise Torch2JaxError(
                    f"{self.func} has no lowering that draws from a generator: leave generator= out"
                )
        if kwargs:
            device = kwargs.get("device")
            if device is not None and device.type not in ("jax", "lazy"):
                if not self._reads_ends:
                    return self._on_other_device(device, args, kwargs)
                ours = [a for a in args if type(a) is Tensor]
                if not any(isinstance(a._cell.array, Tracer) for a in ours):
                    there = [to_torch(a) if type(a) is Tensor else a for a in args]
                    return self.func(*there, **kwargs)
                kwargs = {**kwargs, "device": torch.device("jax")}
        if self._in_lists and len(args[0]) > 1 and items_meet(_lists(args)):
            return self._in_turn(args, kwargs)
        if self.route.decomposition is not None and self.route.target in state.active:
            raise NoDecompositionHere  # its decomposition calls it
        return self.carry_out(args, kwargs)

    def _on_other_device(self, device: torch.device, args: Any, kwargs: Any) -> Any:
        """Carry out ``zeros_like(x, device="cpu")``: make a tensor elsewhere, like one of ours."""

        def like(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

        return self.func(*[like(a) for a in args], **kwargs)

    def _in_turn(self, args: Any, kwargs: Any) -> None:
        """Go item by item: in ``_foreach_add_([a, a], 1)`` each sees what was written before."""
        for i in range(len(args[0])):
            self.func(*[_item(a, i) for a in args], **kwargs)

    def carry_out(self, args: Any, kwargs: Any) -> Any:
        """Return the result of a call on device jax."""
        route = self.route
        if state.events is not None and not state.composite:
            state.events.add(self.func, route.kind)
        key, operands, template, named = self.read(args, kwargs)
        runner = self._runners.get(key)
        if runner is None:
            program = OperatorProgram(route, template, named, operands)
            runner = self._runners[key] = self._runner_type(self, program)
        program = runner.program
        for slot in program.views_written:
            refuse_overlap(operands[slot], route.fills)
        if captures:
            note_read(operands)
        if program.asks_numbers:
            operands = [narrow_number(x) if type(x) is float else x for x in operands]
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
        call = Call(args, kwargs, operands, arrays)
        if route.random:
            refuse_parameters(self.func, args, kwargs)
            call.words = random_streams.next_words(kwargs.get("generator"))
            traced = traced or isinstance(call.words, Tracer)
            arrays.append(call.words)
        elif state.factories_traced and not program.has_tensors:
            traced = is_large(program, operands)
        result = runner.trace(call) if traced else runner.run(call)
        if not (program.wide or state.composite):
            wide = program.makes_wide()
            if wide is not None and not in_backward_pass():  # a gradient only follows its tensor
                admit(wide, program.names_dtype)
        return result

    def read(self, args: Any, kwargs: Any) -> tuple[Any, list[Any], list[Any], dict[str, Any]]:
        """Return the key of a call's program, its operands, and the templates of its arguments."""
        route = self.route
        operands: list[Any] = []
        key: list[Any] = [x64_enabled(), torch.get_default_dtype()]
        template = [
            read_argument(a, operands, key, takes_numbers)
            for a, takes_numbers in zip(args, route.scalars, strict=False)
        ]
        named: dict[str, Any] = {}
        for name, a in kwargs.items():
            if name != "generator":
                key.append(name)
                named[name] = read_argument(a, operands, key, route.scalar(name))
        if route.writes_several:  # operands may be views of one cell
            key += cells_of(operands)
        return tuple(key), operands, template, named

    def run_by(self, runner_type: type[Runner]) -> None:
        """Carry out further calls with runners of this type."""
        self._runner_type, self._runners = runner_type, {}

    # --- repeated calls

    @property
    def repeats(self) -> bool:
        """Say whether the extension may carry out calls like one that has been made."""
        return self._runner_type is Compiled and not self.route.random

    def replay(self, args: Any, kwargs: Any, result: Any) -> Any:
        """Return how the extension repeats calls like this one, which has been made, or None.

        A replay stands for ``carry_out`` where nothing is traced; see ``dispatch``. Such calls have
        operands of the same sizes, so their results have those of ``result``.
        """
        key, operands, *_ = self.read(args, kwargs)
        runner = self._runners.get(key)
        if runner is None or runner.program.outs:
            return None
        program = runner.program
        if not program.wide and program.makes_wide() is not None:
            return None  # each line that makes float64 of something else gets its warning
        if program.asks_numbers:
            return None
        if self._in_lists and len(set(program.cells)) < len(operands):
            return None  # each call has to ask whether items meet
        returned = -1  # it returns the program's results
        if program.mutated and (self.route.returns_mutated or not self.route.returns):
            returned = self.route.returns
        if returned > len(program.mutated) or (returned < 0 and not program.torch_dtypes):
            return None
        made = [] if returned >= 0 else [x for x in torch_tree.tree_leaves(result) if x is not None]
        return (
            program,
            program.jitted,
            tuple([(x.dtype, tuple(x.shape), sort_of(x.dtype, x.shape)) for x in made]),
            tuple(program.mutated),
            tuple(program.views_written),
            returned,
        )


def _runner_type(route: Route) -> type[Runner]:
    if route.kind == "decomposed":
        return Decomposed
    if route.kind == "native" and not route.lowered.eager:
        return Compiled
    return Uncompiled


def _item(a: Any, i: int) -> Any:
    if isinstance(a, torch.Tensor):  # it holds one number, or one for each item
        return a[i : i + 1] if a.ndim else a
    return [a[i]] if isinstance(a, list | tuple) else a


def _lists(args: Any) -> list[Any]:
    return [a for a in args if isinstance(a, list | tuple)]
