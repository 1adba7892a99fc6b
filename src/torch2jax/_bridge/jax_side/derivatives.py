"""Forward and reverse mode.

For a call ``y = f(x)`` with tangents ``t`` of the inputs ``S`` (those that are not symbolically
zero and whose dtype has tangents) and inexact outputs ``D``:

    jvp         y = f(x),  t_y = f.jvp(S, D)(x, t)
    transpose   of f.jvp(S, D) in t:  c_x = f.vjp(S, D)(x, c)      and the other way round

With the tape (see ``torch_side/tape``) the call of ``f`` keeps its graph and returns a token,
which both derivatives take after the primals: ``f.vjp`` then runs only the backward pass.

A call that is linear but not one of these two (the user's own linear function, under
``jax.linear_transpose``) is transposed by its ``vjp`` at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from ..._compat.jax import register_dce_rule
from ..._errors import DifferentiationError
from ..torch_side.callee import Callee
from ..torch_side.tape.calls import is_keep, keepable, keeping, with_token
from .primitive import TOKEN, call, torch_call_p


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
    callee: Callee,
    results: Any,
    differentiable: bool,
) -> tuple[list[Any], list[Any]]:
    wrt = tuple(
        i
        for i, (x, t) in enumerate(zip(primals, tangents, strict=True))
        if not isinstance(t, ad.Zero) and is_inexact(jax.typeof(x).dtype)
    )
    of = tuple(i for i, (_, dtype) in enumerate(results) if is_inexact(dtype))
    derive = bool(wrt and of)
    if derive and not differentiable:
        raise past_depth(callee)
    token: list[Any] = []
    keep = None
    if derive and keepable(callee):
        keep = keeping(callee, wrt)
        out = call(keep, primals, (*results, TOKEN))
        token = [out.pop()]
    else:
        out = call(callee, primals, results, differentiable)
    out_tangents: list[Any] = [ad.Zero(jax.typeof(y).to_tangent_aval()) for y in out]
    if derive:
        f, primals, wrt = untaped(callee, primals, wrt)
        derived = f.jvp(wrt, of)
        if keep is not None:
            derived = with_token(derived, len(wrt), keep)
        moved = [t for t in tangents if not isinstance(t, ad.Zero)]
        seeds = [t for t in moved if is_inexact(jax.typeof(t).dtype)]
        operands = [*primals, *token, *seeds]
        for i, t in zip(of, call(derived, operands, [results[i] for i in of]), strict=True):
            out_tangents[i] = t
    return out, out_tangents


def untaped(
    callee: Callee, operands: Sequence[Any], wrt: tuple[int, ...]
) -> tuple[Callee, Sequence[Any], tuple[int, ...]]:
    """What a call computes, tape aside: callee, operands and operand indices without a token."""
    if is_keep(callee):
        assert callee.parent is not None
        return callee.parent, operands, wrt
    if callee.keep is None:
        return callee, operands, wrt
    assert callee.parent is not None
    at = callee.inputs.index("the token")
    without = [x for i, x in enumerate(operands) if i != at]
    return callee.parent, without, tuple(i - (i > at) for i in wrt)


def past_depth(callee: Callee) -> DifferentiationError:
    """The error for a derivative beyond ``depth=``."""
    done = callee.path.count("/vjp")
    return DifferentiationError(
        f"{callee.options.label} is differentiated {done + 1} times, and torch2jax(..., "
        f"depth={done}) allows {done or 'none'}. Wrap it with depth={done + 1} or more, or with "
        "depth=None (the default) for derivatives of any order in both modes."
    )


def _transpose(
    cotangents: Sequence[Any],
    *operands: Any,
    callee: Callee,
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
    f, primals, where = untaped(callee, operands, linear)
    transposed = f.transpose(where, of)
    if transposed is not None:
        others = [x for x in primals if not ad.is_undefined_primal(x)]
        others = others[: len(transposed.inputs) - len(of)]
        if callee.keep is not None:
            others.append(operands[callee.inputs.index("the token")])
            transposed = with_token(transposed, len(of), callee.keep)
        out = _call_transposed(transposed, f, where, others + seeds, avals)
    else:
        at_zero = [jnp.zeros(*_shape_dtype(x)) if ad.is_undefined_primal(x) else x for x in primals]
        out = call(f.vjp(where, of), at_zero + seeds, avals)
    for i, g in zip(linear, out, strict=True):
        grads[i] = g
    return grads


def _call_transposed(
    transposed: Callee,
    callee: Callee,
    linear: tuple[int, ...],
    operands: list[Any],
    avals: list[ShapeDtype],
) -> list[Any]:
    """Call ``transposed`` and bring its results to the shapes of the linear operands.

    A batched transpose returns rows at dim 0: an operand without a batch dim gets their sum,
    another one its rows where it had them. Batches nest, the outermost first.
    """
    levels = [tuple(dims[i] for i in linear) for dims in callee.batch_levels()]
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


def _drop_token(used: list[bool], eqn: Any) -> tuple[list[bool], Any]:
    """Dead code elimination: a call whose token nobody takes keeps no graph.

    So the first forward pass under ``jax.checkpoint`` keeps none, nor does an unused ``vjp``.
    """
    callee = eqn.params["callee"]
    if not any(used) and not eqn.effects:
        return [False] * len(eqn.invars), None
    if is_keep(callee) and not used[-1]:
        params = dict(eqn.params, callee=callee.parent, results=eqn.params["results"][:-1])
        eqn = eqn.replace(params=params, outvars=eqn.outvars[:-1])
    return [True] * len(eqn.invars), eqn


ad.primitive_jvps[torch_call_p] = _jvp
register_dce_rule(torch_call_p, _drop_token)
ad.primitive_transposes[torch_call_p] = _transpose
