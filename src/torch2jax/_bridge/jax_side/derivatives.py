"""Calls have rules for forward and reverse mode.

For a call ``y = f(x)`` with tangents ``t`` of the inputs ``S`` (those that are not symbolically
zero and whose dtype has tangents) and inexact outputs ``D``:

    jvp         y = f(x),  t_y = f.jvp(S, D)(x, t)
    transpose   of f.jvp(S, D) in t:  c_x = f.vjp(S, D)(x, c)      and the other way round

With the tape (see ``torch_side/tape``) the call of ``f`` keeps its graph and returns a token,
which both derivatives take after the primals: ``f.vjp`` then runs only the backward pass. A
compiled call returns residuals in its place: see ``compiled.splitting``.

A derivative is linear in its last operands, and its jvp in those alone is itself:

    g = f.jvp(S, D) or f.vjp(S, D):   d g(x, t) = g(x, dt)

So ``t`` is no operand of the tangent's call, on which a solver may then build a Jacobian that is
transposed in ``t`` (``lax.custom_root``).

A call that is linear but not one of these two (the user's own linear function, under
``jax.linear_transpose``) is transposed by its ``vjp`` at zero.

``depth=k`` bounds ``orders``, which a call carries: ``y`` keeps those of the call, and each
derivative has one less. A call that has none left refuses to be differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from ..._compat.jax import register_dce_rule, register_remat_rule
from ..._errors import DifferentiationError
from ..compiled.calls import splitting, transposed_like, with_residuals
from ..torch_side.callee import Callee
from ..torch_side.tape.calls import keepable, keeping, returns_token, untaped, with_token
from .primitive import TOKEN, call, torch_call_p


def is_inexact(dtype: Any) -> bool:
    """Return whether values of this dtype have tangents."""
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
    orders: int | None,
) -> tuple[list[Any], list[Any]]:
    # A token has no tangent: the callee without it has the same derivatives.
    f, operands = untaped(callee), callee.without_token(primals)
    seeds = {
        i: t
        for i, (x, t) in enumerate(zip(operands, callee.without_token(tangents), strict=True))
        if not isinstance(t, ad.Zero) and is_inexact(jax.typeof(x).dtype)
    }
    wrt = tuple(seeds)
    own = results[: len(results) - len(callee.residuals)]  # residuals have no tangents
    of = tuple(i for i, (_, dtype) in enumerate(own) if is_inexact(dtype))
    if not wrt or not of:
        out = call(callee, primals, results, orders)
        return out, [ad.Zero(jax.typeof(y).to_tangent_aval()) for y in out]
    if orders == 0:
        raise past_depth(callee)
    if wrt[0] in f.linear:
        at = f.linear.start
        moved = [
            seeds[i] if i in seeds else jnp.zeros(*_shape_dtype(operands[i])) for i in f.linear
        ]
        out = call(callee, primals, results, orders)
        return out, call(f, [*operands[:at], *moved], results, one_less(orders))
    derived = f.jvp(wrt, of)
    token: list[Any] = []
    if callee.options.compiled:
        keep = splitting(callee, wrt, of, list(map(_shape_dtype, primals)))
        if keep is not None:
            derived = with_residuals(derived, len(wrt), keep)
            out = call(keep, primals, (*results, *keep.residuals), orders)
            token = out[len(results) :]
            del out[len(results) :]
        else:
            out = call(callee, primals, results, orders)
    elif keepable(callee):
        keep = keeping(callee, wrt)
        derived = with_token(derived, len(wrt), keep)
        out = call(keep, primals, (*results, TOKEN), orders)
        token = [out.pop()]
    else:
        out = call(callee, primals, results, orders)
    out_tangents: list[Any] = [ad.Zero(jax.typeof(y).to_tangent_aval()) for y in out]
    moved = [*operands, *token, *seeds.values()]
    pushed = call(derived, moved, [results[i] for i in of], one_less(orders))
    for i, t in zip(of, pushed, strict=True):
        out_tangents[i] = t
    return out, out_tangents


def one_less(orders: int | None) -> int | None:
    """Return how many derivatives are left to a derivative of a call."""
    return orders and orders - 1


def past_depth(callee: Callee) -> DifferentiationError:
    """Return the error for a derivative beyond ``depth=``."""
    done = callee.path.count("/vjp") + callee.path.count("/jvp")
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
    orders: int | None,
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
    f, primals = untaped(callee), callee.without_token(operands)
    # These are their places among the operands without the token, which is never linear.
    where = tuple(i for i, x in enumerate(primals) if ad.is_undefined_primal(x))
    transposed = f.transpose(where, of)
    if transposed is not None:
        others = [x for x in primals if not ad.is_undefined_primal(x)]
        others = others[: len(transposed.inputs) - len(of)]
        if callee.token_at is not None:
            assert callee.keep is not None
            others += operands[callee.token_at : callee.token_at + callee.tokens]
            if callee.options.compiled:
                transposed = transposed_like(transposed, len(of), callee)
            else:
                transposed = with_token(transposed, len(of), callee.keep)
        out = _call_transposed(transposed, f, where, others + seeds, avals, orders)
    else:
        at_zero = [jnp.zeros(*_shape_dtype(x)) if ad.is_undefined_primal(x) else x for x in primals]
        out = call(f.vjp(where, of), at_zero + seeds, avals, one_less(orders))
    for i, g in zip(linear, out, strict=True):
        grads[i] = g
    return grads


def _call_transposed(
    transposed: Callee,
    callee: Callee,
    linear: tuple[int, ...],
    operands: list[Any],
    avals: list[ShapeDtype],
    orders: int | None,
) -> list[Any]:
    """Call ``transposed`` and bring its results to the shapes of the linear operands.

    A batched transpose returns rows at dim 0. An operand without a batch dim gets their sum, and
    another one gets its rows where it had them. Batches nest, the outermost first.
    """
    levels = [tuple(dims[i] for i in linear) for dims in callee.batch_levels()]
    rows = operands[-1].shape[: len(levels)]  # the last operand is a cotangent
    results = []
    for k, (full, dtype) in enumerate(avals):
        shape = list(full)
        for dims in levels:
            if (d := dims[k]) is not None:
                del shape[d]
        results.append(((*rows, *shape), dtype))
    out = call(transposed, operands, results, orders)
    for k, x in enumerate(out):
        for level, dims in reversed(list(enumerate(levels))):
            d = dims[k]
            x = x.sum(level) if d is None else jnp.moveaxis(x, level, level + d)
        out[k] = x
    return out


def _drop_token(used: list[bool], eqn: Any) -> tuple[list[bool], Any]:
    """Eliminate dead code: a call whose token nobody takes keeps no graph.

    So the first forward pass under ``jax.checkpoint`` keeps none, nor does an unused ``vjp``.
    """
    callee = eqn.params["callee"]
    if not any(used) and not eqn.effects:
        return [False] * len(eqn.invars), None
    if returns_token(callee) and not used[-1]:
        params = dict(eqn.params, callee=callee.parent, results=eqn.params["results"][:-1])
        eqn = eqn.replace(params=params, outvars=eqn.outvars[:-1])
    elif (n := len(callee.residuals)) and not any(used[-n:]):
        params = dict(eqn.params, callee=callee.plain, results=eqn.params["results"][:-n])
        eqn = eqn.replace(params=params, outvars=eqn.outvars[:-n])
    return [True] * len(eqn.invars), eqn


def _without_recomputed_token(eqn: Any, recomputed: list[bool]) -> Any:
    """Let a derivative under ``jax.checkpoint`` run forward by itself, where it would take a token.

    XLA does not see what the tape holds. It may run all the recomputed calls early, and their
    graphs would lie on the tape together. Without its token a derivative depends on nothing that
    was kept early: it runs forward when its cotangent is there. The call that would have kept the
    graph goes, where nothing else needs its results.
    """
    callee = eqn.params["callee"]
    at = callee.token_at
    if at is None or not recomputed[at]:
        return eqn
    params = dict(eqn.params, callee=untaped(callee))
    return eqn.replace(params=params, invars=list(callee.without_token(eqn.invars)))


ad.primitive_jvps[torch_call_p] = _jvp
register_dce_rule(torch_call_p, _drop_token)
register_remat_rule(torch_call_p, _without_recomputed_token)
ad.primitive_transposes[torch_call_p] = _transpose
