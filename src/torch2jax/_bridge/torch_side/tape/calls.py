"""Which calls keep their graph, and the calls that take it."""

from __future__ import annotations

import weakref
from typing import Any

from ..callee import Callee
from ..derivatives import Program, Vjp, Vmap
from ..gradients import Indices
from .programs import DropGraph, KeepGraph, PullThroughGraph
from .table import tape


def keepable(callee: Callee) -> bool:
    """Whether graphs of this callee are kept: the user's function and its batched form."""
    while isinstance(callee.program, Vmap) and callee.parent is not None:
        callee = callee.parent
    return callee.options.tape and callee.parent is None


def is_keep(callee: Callee) -> bool:
    """Whether this callee returns a token as its last output."""
    return isinstance(callee.program, KeepGraph)


def is_vjp(callee: Callee) -> bool:
    """Whether this callee is a pullback."""
    return isinstance(callee.program, Vjp)


def keeping(callee: Callee, wrt: Indices) -> Callee:
    """``x -> (outputs, token)``: the call that keeps its graph for derivatives in ``wrt``."""
    label = callee.options.label + callee.path
    child = callee.derive(
        f"/keep({','.join(map(str, wrt))})",
        lambda: KeepGraph(callee.program, wrt, label, callee.options.rng is not None),
        list(callee.inputs),
        [*callee.outputs, "the token"],
    )
    if "forget" not in child.memo:
        # When no wrapper and no executable is left, nor are graphs whose backward never ran.
        child.memo["forget"] = weakref.finalize(child, tape.forget, id(child.program))
        child.memo["forget"].atexit = False
    return child


def with_token(callee: Callee, after: int, keep: Callee) -> Callee:
    """``callee``, a derivative, with a token of ``keep`` before its last ``after`` operands."""
    at = len(callee.inputs) - after
    program: Any = callee.program
    batched = isinstance(program, Vmap)
    vjp = program.parent if batched else program
    assert isinstance(keep.program, KeepGraph)
    keeper = keep.program

    def make() -> Program:
        if isinstance(vjp, Vjp):
            dims = vjp.split(program.dims) if batched else ((), ())
            if all(d is None for d in dims[0]) and all(d == 0 for d in dims[1]):
                return PullThroughGraph(vjp, keeper, batched, program)
        return DropGraph(program, after, keeper)

    inputs = [*callee.inputs[:at], "the token", *callee.inputs[at:]]
    suffix = f"/tape({','.join(map(str, keeper.wrt))})"
    child = callee.derive(suffix, make, inputs, list(callee.outputs))
    child.keep = keep  # the graphs of a token are found by the program that kept them
    return child
