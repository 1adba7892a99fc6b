"""``depth=k``: ``k`` nested ``jax.custom_vjp`` rules, on the callables of the primitive's rules.

A level is ``y = f(x)`` with backward pass ``(x, c) -> f.vjp(S, D)(x, c)``, which is a level itself;
the last one is a call that refuses to be differentiated.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax

from ..._compat.jax import varying_together
from ..torch_side.callee import Callee
from ..torch_side.tape.calls import keepable, keeping, with_token
from .derivatives import is_inexact, untaped
from .primitive import TOKEN, call

ShapeDtype = tuple[tuple[int, ...], Any]


def call_to_depth(
    callee: Callee,
    operands: Sequence[Any],
    results: Sequence[ShapeDtype],
    depth: int,
    nondiff: Collection[int] = (),
) -> list[Any]:
    """A call that can be differentiated ``depth`` times in reverse mode.

    Operands in ``nondiff`` get zero cotangents, and none are computed for them.
    """

    def run(*xs: Any) -> list[Any]:
        return call(callee, xs, results, differentiable=False)

    if depth == 0:
        return run(*operands)
    # Outside of the rules: a cotangent must vary over the mesh as its operand does.
    operands = varying_together(operands)
    avals = [(x.shape, x.dtype) for x in map(jax.typeof, operands)]  # the rules hold these alone
    f, _, _ = untaped(callee, operands, ())
    at = callee.inputs.index("the token") if callee.keep is not None else len(operands)
    wrt = tuple(i for i, (_, d) in enumerate(avals) if is_inexact(d) and i not in nondiff)
    of = tuple(i for i, (_, d) in enumerate(results) if is_inexact(d))
    if not wrt or not of:
        return run(*operands)
    # In the function without its token: the operands after it move up.
    pullback = f.vjp(tuple(i - (i > at) for i in wrt), of)
    keep = keeping(callee, wrt) if keepable(callee) else None
    if keep is not None:
        pullback = with_token(pullback, len(of), keep)

    def forward(*xs: Any) -> tuple[list[Any], list[Any]]:
        if keep is None:
            return level(*xs), [x for i, x in enumerate(xs) if i != at]
        out = level_keeping(*xs)
        return out[:-1], [*xs, out[-1]]

    def backward(saved: list[Any], cotangents: list[Any]) -> tuple[Any, ...]:
        seeds = [cotangents[i] for i in of]
        shapes = [avals[i] for i in wrt]
        grads = call_to_depth(pullback, [*saved, *seeds], shapes, depth - 1, nondiff)
        by_index = dict(zip(wrt, grads, strict=True))
        return tuple(by_index.get(i) for i in range(len(avals)))

    def run_keeping(*xs: Any) -> list[Any]:
        return call(keep or callee, xs, (*results, TOKEN), differentiable=False)

    def forward_keeping(*xs: Any) -> tuple[list[Any], list[Any]]:
        out = level_keeping(*xs)
        return out, [*xs, out[-1]]

    # The forward pass of a level may be differentiated itself, by an outer transformation.
    level_keeping = jax.custom_vjp(run_keeping)
    level_keeping.defvjp(forward_keeping, backward)
    level = jax.custom_vjp(run)
    level.defvjp(forward, backward)
    return level(*operands)
