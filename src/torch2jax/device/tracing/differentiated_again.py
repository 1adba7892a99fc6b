"""A second derivative of a function whose derivative the user has written.

It differentiates the result of the forward pass again. That derivative is the user's, too, and the
forward pass runs without gradients, so JAX has none of it. The backward pass is linear in its
cotangents, so its transpose pushes tangents forward.

A primitive gives the results that derivative. It is no ``jax.custom_jvp``, because JAX before 0.12
forgets the rule of one in a loop that is differentiated twice, and would go on with the derivatives
of the forward pass's operators. Their operands are constants to those derivatives. In the transpose
of a backward pass that has such a function in it they are not: there its operators are transposed.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.interpreters import ad, batching, mlir

from ..._compat.jax import Primitive
from ..._errors import DifferentiationError

__all__ = ["differentiated_again"]

_PACKAGE = __name__.partition(".")[0]

_results_p = Primitive(f"{_PACKAGE}_results_of_autograd_function")
_results_p.multiple_results = True
_operand_p = Primitive(f"{_PACKAGE}_operand_of_autograd_function")


def differentiated_again(name: str, function: Any, backwards: Any) -> Any:
    """Return the function with a derivative in both modes, made of the backward pass alone."""

    def again(*operands: Any) -> list[Any]:
        out = function(*map(_operand_p.bind, operands))
        return _results_p.bind(*out, *operands, count=len(out), name=name, backwards=backwards)

    return again


@_results_p.def_abstract_eval
@_results_p.def_impl
def _same(*given: Any, count: int, **_: Any) -> list[Any]:
    return list(given[:count])


def _push(primals: Any, tangents: Any, *, count: int, name: str, backwards: Any) -> Any:
    out = _results_p.bind(*primals, count=count, name=name, backwards=backwards)
    operands, pushed_by = primals[count:], tangents[count:]
    moving = [i for i, t in enumerate(pushed_by) if not isinstance(t, ad.Zero)]
    floats = [jax.numpy.issubdtype(x.dtype, jax.numpy.inexact) for x in out]

    def pull(chosen: Any) -> list[Any]:
        left = iter(chosen)
        found = backwards(operands, [next(left) if f else None for f in floats])
        zeros = jax.numpy.zeros_like
        return [zeros(pushed_by[i]) if found[i] is None else found[i] for i in moving]

    left = iter(())
    if moving and any(floats):
        like = [
            jax.ShapeDtypeStruct(x.shape, x.dtype)
            for x, is_float in zip(out, floats, strict=True)
            if is_float
        ]
        try:
            (pushed,) = jax.linear_transpose(pull, like)([pushed_by[i] for i in moving])
        except (NotImplementedError, AssertionError, TypeError, ValueError) as error:
            raise DifferentiationError(
                f"{name} has no second derivative: its backward pass is not linear in its "
                "cotangents, or it computes without gradients."
            ) from error
        left = iter(pushed)
    return out, [
        next(left) if is_float and moving else ad.Zero(jax.typeof(x).to_tangent_aval())
        for x, is_float in zip(out, floats, strict=True)
    ]


def _batch(given: Any, dims: Any, *, count: int, name: str, backwards: Any) -> Any:
    size = next(x.shape[d] for x, d in zip(given, dims, strict=True) if d is not None)
    rows = [
        jax.numpy.broadcast_to(x, (size, *x.shape)) if d is None else jax.numpy.moveaxis(x, d, 0)
        for x, d in zip(given, dims, strict=True)
    ]
    out = _results_p.bind(*rows, count=count, name=name, backwards=jax.vmap(backwards))
    return out, [0] * count


def _transpose(cotangents: Any, *given: Any, count: int, **_: Any) -> list[Any]:
    return [
        (cotangents[i] if i < count else ad.Zero(x.aval)) if ad.is_undefined_primal(x) else None
        for i, x in enumerate(given)
    ]


ad.primitive_jvps[_results_p] = _push
ad.primitive_transposes[_results_p] = _transpose
batching.primitive_batchers[_results_p] = _batch
mlir.register_lowering(_results_p, lambda _, *given, count, **__: list(given[:count]))


@_operand_p.def_abstract_eval
@_operand_p.def_impl
def _operand(x: Any) -> Any:
    return x


def _constant(primals: Any, _: Any) -> Any:
    out = _operand_p.bind(*primals)
    return out, ad.Zero(jax.typeof(out).to_tangent_aval())


ad.primitive_jvps[_operand_p] = _constant
ad.primitive_transposes[_operand_p] = lambda cotangent, _: [cotangent]
batching.primitive_batchers[_operand_p] = lambda given, dims: (_operand_p.bind(*given), *dims)
mlir.register_lowering(_operand_p, lambda _, x: [x])
