"""Some calls keep their graph, and other calls take it."""

from __future__ import annotations

import weakref

from ..callee import Callee
from ..derivatives import Program, Vjp, Vmap
from ..gradients import Indices
from .kept_graph import GraphPolicy
from .programs import DropGraph, KeepGraph, PullThroughGraph
from .table import tape


def keepable(callee: Callee) -> bool:
    """Return whether this callee, the user's function or its batched form, may keep something."""
    while isinstance(callee.program, Vmap) and callee.parent is not None:
        callee = callee.parent
    return callee.options.tape and callee.parent is None


def returns_token(callee: Callee) -> bool:
    """Return whether this callee returns a token as its last output."""
    return isinstance(callee.program, KeepGraph)


def is_vjp(callee: Callee) -> bool:
    """Return whether this callee is a pullback."""
    return isinstance(callee.program, Vjp)


def untaped(callee: Callee) -> Callee:
    """Return the callee that computes the same without a token or residuals."""
    if callee.plain is not None:
        return callee.plain
    if returns_token(callee) or callee.token_at is not None:
        assert callee.parent is not None
        return callee.parent
    return callee


def keeping(callee: Callee, wrt: Indices) -> Callee:
    """Return ``x -> (outputs, token)``, which keeps its graph for derivatives in ``wrt``."""

    def make() -> Program:
        options = callee.options
        policy = GraphPolicy(options.label + callee.path, wrt, options.rng is not None)
        program = KeepGraph(callee.program, policy)
        # Graphs whose backward pass never ran go when no wrapper and no executable is left.
        weakref.finalize(program, tape.forget, policy).atexit = False
        return program

    suffix = f"/keep({','.join(map(str, wrt))})"
    return callee.derive(suffix, make, callee.inputs, [*callee.outputs, "the token"])


def kept_operands(keep: Callee) -> Indices:
    """Return the operands for whose derivatives a call of ``keep`` keeps its graph."""
    assert isinstance(keep.program, KeepGraph)
    return keep.program.policy.wrt


def with_token(callee: Callee, after: int, keep: Callee) -> Callee:
    """Give a derivative, ``callee``, a token of ``keep`` before its last ``after`` operands."""
    at = len(callee.inputs) - after
    program = callee.program
    keeper = keep.program
    assert isinstance(keeper, KeepGraph)

    def make() -> Program:
        batched = isinstance(program, Vmap)
        vjp = program.base if batched else program
        if isinstance(vjp, Vjp):
            dims = vjp.split(program.dims) if batched else ((), ())
            if all(d is None for d in dims[0]) and all(d == 0 for d in dims[1]):
                return PullThroughGraph(program, vjp, keeper, batched)
        return DropGraph(program, after, keeper.policy)

    inputs = [*callee.inputs[:at], "the token", *callee.inputs[at:]]
    suffix = f"/tape({','.join(map(str, keeper.policy.wrt))})"
    return callee.derive(suffix, make, inputs, callee.outputs, token_at=at, keep=keep)
