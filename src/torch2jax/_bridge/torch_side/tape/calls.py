"""Which calls keep their graph, and the calls that take it."""

from __future__ import annotations

import weakref
from typing import Any

from ..callable import Callable
from ..derivatives import Program, Vjp, Vmap
from ..gradients import Indices
from .programs import Keep, Popped, Pull
from .table import tape


def keepable(callable: Callable) -> bool:
    """Whether graphs of this callable are kept: the user's function and its batched form."""
    while isinstance(callable.program, Vmap) and callable.parent is not None:
        callable = callable.parent
    return callable.options.tape and callable.parent is None


def is_keep(callable: Callable) -> bool:
    """Whether this callable returns a token as its last output."""
    return isinstance(callable.program, Keep)


def is_vjp(callable: Callable) -> bool:
    """Whether this callable is a pullback."""
    return isinstance(callable.program, Vjp)


def kept(callable: Callable, wrt: Indices) -> Callable:
    """``x -> (outputs, token)``: the call that keeps its graph for derivatives in ``wrt``."""
    label = callable.options.label + callable.path
    child = callable.derive(
        f"/keep({','.join(map(str, wrt))})",
        lambda: Keep(callable.program, wrt, label, callable.options.rng is not None),
        list(callable.inputs),
        [*callable.outputs, "the token"],
    )
    if "forget" not in child.memo:
        # When no wrapper and no executable is left, nor are graphs whose backward never ran.
        child.memo["forget"] = weakref.finalize(child, tape.forget, id(child.program))
        child.memo["forget"].atexit = False
    return child


def with_token(callable: Callable, after: int, keep: Callable) -> Callable:
    """``callable``, a derivative, with a token of ``keep`` before its last ``after`` operands."""
    at = len(callable.inputs) - after
    program: Any = callable.program
    batched = isinstance(program, Vmap)
    vjp = program.parent if batched else program
    assert isinstance(keep.program, Keep)
    keeper = keep.program

    def make() -> Program:
        if isinstance(vjp, Vjp):
            dims = vjp.split(program.dims) if batched else ((), ())
            if all(d is None for d in dims[0]) and all(d == 0 for d in dims[1]):
                return Pull(vjp, keeper, batched, program)
        return Popped(program, after, keeper)

    inputs = [*callable.inputs[:at], "the token", *callable.inputs[at:]]
    suffix = f"/tape({','.join(map(str, keeper.wrt))})"
    child = callable.derive(suffix, make, inputs, list(callable.outputs))
    child.keep = keep  # the graphs of a token are found by the program that kept them
    return child
