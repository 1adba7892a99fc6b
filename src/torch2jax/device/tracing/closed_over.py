"""Tracers that a function of arrays closes over become its operands."""

from __future__ import annotations

from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

__all__ = ["converted"]

_HELD = object()


def converted(fn: Any, *args: Any) -> tuple[Any, list[Any], Any]:
    """Trace ``fn``; return it for flat operands, the tracers that it closes over, its result.

    These are its last operands. ``jax.closure_convert`` leaves tracers of integers where they are.
    """
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    jaxpr, spec = closed.jaxpr, jax.tree.structure(out)
    held = [c for c in closed.consts if isinstance(c, Tracer)]
    count = len(held)  # the tracers themselves are not kept
    fixed = [_HELD if isinstance(c, Tracer) else c for c in closed.consts]

    def call(*operands: Any) -> Any:
        n = len(operands) - count
        last = iter(operands[n:])
        consts = [next(last) if c is _HELD else c for c in fixed]
        results = jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*operands[:n])
        return jax.tree.unflatten(spec, results)

    return call, held, out
