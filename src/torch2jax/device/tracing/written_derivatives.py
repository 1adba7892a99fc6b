"""A function has the derivative that the user has written for it, in both modes and to any order.

A primitive gives the results their derivative. Its tangents are those of a second primitive, which
is linear: transposed it is the user's backward pass, and where it is evaluated (``jax.jvp``) it is
the user's ``jvp``. Where there is none, it is the transpose of the backward pass, which is linear
in its cotangents. So each mode runs what the user has written for it, linear or not, and
differentiates that for a second derivative.

These are no ``jax.custom_vjp``, which refuses forward mode, and no ``jax.custom_jvp``, because JAX
before 0.12 forgets the rule of one in a loop that is differentiated twice and would go on with the
derivatives of the forward pass's operators. Their operands are constants to those derivatives.

A backward pass that computes with its cotangents while gradients are off
(``once_differentiable``) has no second derivative. Its results pass a third primitive, which
refuses to be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from ..._compat.jax import Primitive, varying_together
from ..._errors import DifferentiationError
from ...lowerings.derivative_rules import in_rows
from ..operators.cut import constant, is_cut

__all__ = ["Written", "with_derivative"]

_PACKAGE = __name__.partition(".")[0]

_results_p = Primitive(f"{_PACKAGE}_results_of_autograd_function")
_pushed_p = Primitive(f"{_PACKAGE}_tangents_of_autograd_function")
_once_p = Primitive(f"{_PACKAGE}_gradients_without_derivative")
for _primitive in (_results_p, _pushed_p, _once_p):
    _primitive.multiple_results = True

Backwards = Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]
"""It takes operands and the cotangents of the results, and returns gradients of the operands.

A result that is no float has None for a cotangent, and so has an operand without a gradient."""

Forwards = Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]
"""It takes operands and their tangents, and returns the tangents of the results that are floats.

An operand that does not move has None for a tangent, and so may a result have."""


class Written(NamedTuple):
    """What the user has written for a function of this name."""

    name: str
    backwards: Backwards
    forwards: Forwards | None = None

    def batched(self) -> Written:
        forwards = None if self.forwards is None else jax.vmap(self.forwards)
        return Written(self.name, jax.vmap(self.backwards), forwards)


def with_derivative(function: Any, written: Written) -> Any:
    """Return a function of arrays with the derivatives that are written for it."""
    checked = _refusing_a_second(written.name, written.backwards)
    written = written._replace(backwards=checked)

    def differentiable(*operands: Any) -> list[Any]:
        out = function(*map(constant, operands))
        return _results_p.bind(*out, *operands, count=len(out), written=written)

    return differentiable


# --- results --------------------------------------------------------------------------------------


@_results_p.def_abstract_eval
@_results_p.def_impl
def _same(*given: Any, count: int, **_: Any) -> list[Any]:
    return list(given[:count])


def _push(primals: Any, tangents: Any, *, count: int, written: Written) -> Any:
    out = _results_p.bind(*primals, count=count, written=written)
    operands, pushed_by = primals[count:], tangents[count:]
    moving = tuple(
        i
        for i, t in enumerate(pushed_by)
        if type(t) is not ad.Zero and t.dtype != jax.dtypes.float0
    )
    like = tuple(jax.typeof(x).to_tangent_aval() for x in out)
    floats = _floats(out)
    left = iter(())
    if moving and any(floats):
        left = iter(
            _pushed_p.bind(
                *operands,
                *[pushed_by[i] for i in moving],
                moving=moving,
                like=tuple(x for x, is_float in zip(like, floats, strict=True) if is_float),
                floats=floats,
                written=written,
            )
        )
    return out, [
        next(left) if is_float and moving else ad.Zero(x)
        for x, is_float in zip(like, floats, strict=True)
    ]


def _batch_results(given: Any, dims: Any, *, count: int, written: Written) -> Any:
    out = _results_p.bind(*in_rows(given, dims), count=count, written=written.batched())
    return out, [0] * len(out)


def _transpose_results(cotangents: Any, *given: Any, count: int, written: Written) -> list[Any]:
    """Transpose a function in a backward pass, which is linear in some of its operands.

    Its derivative by these is the user's, too, and does not depend on them.
    """
    outs, operands = given[:count], given[count:]
    moving = tuple(i for i, x in enumerate(operands) if ad.is_undefined_primal(x))
    floats = _floats([x.aval if ad.is_undefined_primal(x) else x for x in outs])
    chosen = [ad.instantiate_zeros(c) for c, f in zip(cotangents, floats, strict=True) if f]
    full = [
        ad.instantiate_zeros(ad.Zero(x.aval)) if i in moving else x for i, x in enumerate(operands)
    ]
    found = dict(zip(moving, _pull(full, chosen, moving, floats, written.backwards), strict=True))
    zeros = [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in outs]
    return [*zeros, *[found.get(i) for i in range(len(operands))]]


def _floats(arrays: Sequence[Any]) -> tuple[bool, ...]:
    return tuple(jax.numpy.issubdtype(x.dtype, jax.numpy.inexact) for x in arrays)


ad.primitive_jvps[_results_p] = _push
ad.primitive_transposes[_results_p] = _transpose_results
batching.primitive_batchers[_results_p] = _batch_results
mlir.register_lowering(_results_p, lambda _, *given, count, **__: list(given[:count]))


# --- tangents -------------------------------------------------------------------------------------


def _pull(
    operands: Sequence[Any],
    chosen: Sequence[Any],
    moving: Sequence[int],
    floats: Sequence[bool],
    backwards: Backwards,
) -> list[Any]:
    """Return the gradients of the operands that move, by the cotangents of the float results."""
    left = iter(chosen)
    found = backwards(operands, [next(left) if is_float else None for is_float in floats])
    return [jax.numpy.zeros_like(operands[i]) if found[i] is None else found[i] for i in moving]


def _pushed(*given: Any, moving: Any, like: Any, floats: Any, written: Written) -> list[Any]:
    """Push tangents forward: as written, or by the transpose of the backward pass."""
    n = len(given) - len(moving)
    operands, tangents = given[:n], given[n:]
    zeros = [ad.instantiate_zeros(ad.Zero(x)) for x in like]  # they vary over mesh axes as it does
    failed: Exception | None = None
    if written.forwards is not None:
        by_place = dict(zip(moving, tangents, strict=True))
        try:
            found = written.forwards(operands, [by_place.get(i) for i in range(n)])
        except Exception as error:  # as on the bridge, the backward pass is tried
            failed = error
        else:
            return [
                zero if t is None else varying_together([t.astype(zero.dtype), zero])[0]
                for t, zero in zip(found, zeros, strict=True)
            ]
    pull = lambda chosen: _pull(operands, chosen, moving, floats, written.backwards)  # noqa: E731
    try:
        (out,) = jax.linear_transpose(pull, zeros)(list(tangents))
    except (NotImplementedError, AssertionError, TypeError, ValueError) as error:
        if failed is not None:
            raise failed from None
        raise DifferentiationError(
            f"{written.name} has no derivative in forward mode (jvp, jacfwd, linearize): its "
            "backward pass is not linear in its cotangents, and there is no jvp that can run. Take "
            "reverse mode (grad, vjp, jacrev), or write a jvp."
        ) from error
    return out


@_pushed_p.def_abstract_eval
def _avals(*_: Any, like: Any, **__: Any) -> list[Any]:
    return list(like)


def _push_again(primals: Any, tangents: Any, **params: Any) -> Any:
    n = len(primals) - len(params["moving"])
    out = _pushed_p.bind(*primals, **params)
    if all(type(t) is ad.Zero for t in tangents[:n]):  # it is linear in the others
        further = [ad.instantiate_zeros(t) for t in tangents[n:]]
        return out, _pushed_p.bind(*primals[:n], *further, **params)
    given = [ad.instantiate_zeros(t) for t in tangents]
    return out, jax.jvp(lambda *x: _pushed(*x, **params), list(primals), given)[1]


def _transpose_pushed(
    cotangents: Any, *given: Any, moving: Any, like: Any, floats: Any, written: Written
) -> list[Any]:
    n = len(given) - len(moving)
    chosen = [ad.instantiate_zeros(c) for c in cotangents]
    return [None] * n + _pull(given[:n], chosen, moving, floats, written.backwards)


def _batch_pushed(given: Any, dims: Any, *, like: Any, written: Written, **params: Any) -> Any:
    rows = in_rows(given, dims)
    size = rows[0].shape[0]
    like = tuple(x.update(shape=(size, *x.shape)) for x in like)
    out = _pushed_p.bind(*rows, like=like, written=written.batched(), **params)
    return out, [0] * len(out)


_pushed_p.def_impl(_pushed)
ad.primitive_jvps[_pushed_p] = _push_again
ad.primitive_transposes[_pushed_p] = _transpose_pushed
batching.primitive_batchers[_pushed_p] = _batch_pushed
mlir.register_lowering(_pushed_p, mlir.lower_fun(_pushed, multiple_results=True))


# --- backward passes that have no derivative ------------------------------------------------------


def _refusing_a_second(name: str, backwards: Backwards) -> Backwards:
    """Return a backward pass that refuses to be differentiated, if PyTorch would refuse it."""

    def checked(operands: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
        places = [i for i, c in enumerate(cotangents) if c is not None]

        def run(operands: Any, chosen: Any) -> Any:
            full: list[Any] = [None] * len(cotangents)
            for i, c in zip(places, chosen, strict=True):
                full[i] = c
            return backwards(operands, full)

        chosen = [cotangents[i] for i in places]
        traced, shapes = jax.make_jaxpr(run, return_shape=True)(list(operands), chosen)
        given = [*operands, *chosen]
        found = jaxpr_as_fun(traced)(*given)
        if _cuts(traced.jaxpr, traced.jaxpr.invars[len(operands) :]):
            found = _once_p.bind(*found, *given, count=len(found), name=name)
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return checked


def _cuts(jaxpr: Any, sources: Sequence[Any]) -> bool:
    """Say whether results depend on ``sources`` by something computed while gradients are off."""
    seen, cut = set(sources), set()
    for equation in jaxpr.eqns:
        # The derivative of results of a function is by its operands alone.
        first = equation.params["count"] if equation.primitive is _results_p else 0
        read = [x for x in equation.invars[first:] if type(x) is not Literal]
        if any(x in seen for x in read):
            seen.update(equation.outvars)
            if is_cut(equation.primitive) or any(x in cut for x in read):
                cut.update(equation.outvars)
    return any(type(x) is not Literal and x in cut for x in jaxpr.outvars)


@_once_p.def_abstract_eval
@_once_p.def_impl
def _gradients(*given: Any, count: int, name: str) -> list[Any]:
    return list(given[:count])


def _refuse(primals: Any, tangents: Any, *, count: int, name: str) -> Any:
    if all(type(t) is ad.Zero for t in tangents):
        out = _once_p.bind(*primals, count=count, name=name)
        return out, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
    raise DifferentiationError(
        f"{name} has no second derivative: its backward pass computes without gradients."
    )


def _batch_once(given: Any, dims: Any, **params: Any) -> Any:
    out = _once_p.bind(*in_rows(given, dims), **params)
    return out, [0] * len(out)


def _transpose_once(cotangents: Any, *given: Any, count: int, name: str) -> list[Any]:
    return [
        (cotangents[i] if i < count else ad.Zero(x.aval)) if ad.is_undefined_primal(x) else None
        for i, x in enumerate(given)
    ]


ad.primitive_jvps[_once_p] = _refuse
ad.primitive_transposes[_once_p] = _transpose_once
batching.primitive_batchers[_once_p] = _batch_once
mlir.register_lowering(_once_p, lambda _, *given, count, name: list(given[:count]))
