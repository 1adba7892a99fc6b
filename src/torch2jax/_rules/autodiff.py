"""Forward and reverse mode.

For a call ``y = f(x)`` with tangents ``t`` of the inputs ``S`` (those that are not symbolically
zero and whose dtype has tangents) and inexact outputs ``D``:

    jvp         y = f(x),  t_y = f.jvp(S, D)(x, t)
    transpose   of f.jvp(S, D) in t:  c_x = f.vjp(S, D)(x, c)      and the other way round

A call that is linear but not one of these two (the user's own linear function, under
``jax.linear_transpose``) is transposed by its ``vjp`` at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from .._callable import Callable
from .._errors import DifferentiationError
from .._primitive import call, torch_call_p


def is_inexact(dtype: Any) -> bool:
    """Whether values of this dtype have tangents."""
    return jnp.issubdtype(dtype, jnp.inexact)


ShapeDtype = tuple[tuple[int, ...], Any]


def _shape_dtype(x: Any) -> ShapeDtype:
    aval = x.aval if ad.is_undefined_primal(x) else jax.typeof(x)
    return aval.shape, aval.dtype


def _jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    callable: Callable,
    results: Any,
    differentiable: bool,
) -> tuple[list[Any], list[Any]]:
    wrt = tuple(
        i
        for i, (x, t) in enumerate(zip(primals, tangents, strict=True))
        if not isinstance(t, ad.Zero) and is_inexact(jax.typeof(x).dtype)
    )
    of = tuple(i for i, (_, dtype) in enumerate(results) if is_inexact(dtype))
    out = call(callable, primals, results, differentiable)
    out_tangents: list[Any] = [ad.Zero(jax.typeof(y).to_tangent_aval()) for y in out]
    if wrt and of:
        if not differentiable:
            raise past_depth(callable)
        derived = callable.jvp(wrt, of)
        operands = [*primals, *(tangents[i] for i in wrt)]
        for i, t in zip(of, call(derived, operands, [results[i] for i in of]), strict=True):
            out_tangents[i] = t
    return out, out_tangents


def past_depth(callable: Callable) -> DifferentiationError:
    """The error for a derivative beyond ``depth=``."""
    done = callable.path.count("/vjp")
    return DifferentiationError(
        f"{callable.options.label} is differentiated {done + 1} times, and torch2jax(..., "
        f"depth={done}) allows {done or 'none'}. Wrap it with depth={done + 1} or more, or with "
        "depth=None (the default) for derivatives of any order in both modes."
    )


def _transpose(
    cotangents: Sequence[Any],
    *operands: Any,
    callable: Callable,
    results: Any,
    differentiable: bool,
) -> list[Any]:
    linear = tuple(i for i, x in enumerate(operands) if ad.is_undefined_primal(x))
    of = tuple(i for i, c in enumerate(cotangents) if not isinstance(c, ad.Zero))
    grads: list[Any] = [None] * len(operands)
    for i in linear:
        grads[i] = ad.Zero(operands[i].aval)
    if not linear or not of:
        return grads
    avals = [_shape_dtype(operands[i]) for i in linear]
    seeds = [cotangents[i] for i in of]
    transposed = callable.transpose(linear, of)
    if transposed is not None:
        others = [x for x in operands if not ad.is_undefined_primal(x)]
        others = others[: len(transposed.inputs) - len(of)]
        out = _call_transposed(transposed, callable, linear, others + seeds, avals)
    else:
        at_zero = [
            jnp.zeros(*_shape_dtype(x)) if ad.is_undefined_primal(x) else x for x in operands
        ]
        out = call(callable.vjp(linear, of), at_zero + seeds, avals)
    for i, g in zip(linear, out, strict=True):
        grads[i] = g
    return grads


def _call_transposed(
    transposed: Callable,
    callable: Callable,
    linear: tuple[int, ...],
    operands: list[Any],
    avals: list[ShapeDtype],
) -> list[Any]:
    """Call ``transposed`` and bring its results to the shapes of the linear operands.

    A batched transpose returns rows at dim 0: an operand without a batch dim gets their sum,
    another one its rows where it had them. Batches nest, the outermost first.
    """
    levels = [tuple(dims[i] for i in linear) for dims in callable.batch_levels()]
    rows = operands[-1].shape[: len(levels)]  # of a cotangent
    results = []
    for k, (full, dtype) in enumerate(avals):
        shape = list(full)
        for dims in levels:
            if (d := dims[k]) is not None:
                del shape[d]
        results.append(((*rows, *shape), dtype))
    out = call(transposed, operands, results)
    for k, x in enumerate(out):
        for level, dims in reversed(list(enumerate(levels))):
            d = dims[k]
            x = x.sum(level) if d is None else jnp.moveaxis(x, level, level + d)
        out[k] = x
    return out


ad.primitive_jvps[torch_call_p] = _jvp
ad.primitive_transposes[torch_call_p] = _transpose
