"""``depth=k``: ``k`` nested ``jax.custom_vjp`` rules, on the callables of the primitive's rules.

A level is ``y = f(x)`` with backward pass ``(x, c) -> f.vjp(S, D)(x, c)``, which is a level itself;
the last one is a call that refuses to be differentiated.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax

from ._callable import Callable
from ._primitive import call
from ._rules.autodiff import is_inexact

ShapeDtype = tuple[tuple[int, ...], Any]


def call_to_depth(
    callable: Callable,
    operands: Sequence[Any],
    results: Sequence[ShapeDtype],
    depth: int,
    nondiff: Collection[int] = (),
) -> list[Any]:
    """A call that can be differentiated ``depth`` times in reverse mode.

    Operands in ``nondiff`` get zero cotangents, and none are computed for them.
    """
    if depth == 0:
        return call(callable, operands, results, differentiable=False)
    avals = [(x.shape, x.dtype) for x in map(jax.typeof, operands)]
    wrt = tuple(i for i, (_, d) in enumerate(avals) if is_inexact(d) and i not in nondiff)
    of = tuple(i for i, (_, d) in enumerate(results) if is_inexact(d))
    if not wrt or not of:
        return call(callable, operands, results, differentiable=False)

    @jax.custom_vjp
    def level(*xs: Any) -> list[Any]:
        return call(callable, xs, results, differentiable=False)

    def forward(*xs: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return level(*xs), xs

    def backward(xs: tuple[Any, ...], cotangents: list[Any]) -> tuple[Any, ...]:
        seeds = [cotangents[i] for i in of]
        grads = call_to_depth(
            callable.vjp(wrt, of), [*xs, *seeds], [avals[i] for i in wrt], depth - 1, nondiff
        )
        by_index = dict(zip(wrt, grads, strict=True))
        return tuple(by_index.get(i) for i in range(len(xs)))

    level.defvjp(forward, backward)
    return level(*operands)
