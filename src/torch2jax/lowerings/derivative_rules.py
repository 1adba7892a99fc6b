"""A function has a derivative of its own, in loops that are differentiated twice as well.

JAX before 0.12 forgets the rule of a ``jax.custom_jvp`` in such a loop (``lax.map``, ``lax.scan``
over arrays) and goes on with the derivatives of the function's operators: at ties and singular
points these are others, or NaN. There a primitive with the rule takes its place. JAX from 0.12 on
keeps the rule, and what is lowered then has a ``jax.custom_jvp``, which other programs know.

A rule is also forgotten where its loss does no harm, so ``jax.custom_jvp`` may stand for a faster
derivative of the same values, as that of gelu does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental import jet
from jax.extend.core import jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from .._compat.jax import FORGETS_DERIVATIVE_RULES, Primitive, varying_together
from .promotion import is_inexact

__all__ = ["in_rows", "own_derivative"]

_PACKAGE = __name__.partition(".")[0]

_kept_p = Primitive(f"{_PACKAGE}_function_with_derivative")

Fn = Callable[..., Any]


class _OwnDerivative:
    """It is called and defined as a ``jax.custom_jvp`` of arrays that returns one array.

    A tangent of integers is None.
    """

    def __init__(self, fn: Fn) -> None:
        self.fn, self.rule = fn, fn
        self.__doc__, self.__name__ = fn.__doc__, fn.__name__

    def defjvp(self, rule: Fn) -> Fn:
        self.rule = rule
        return rule

    def __call__(self, *operands: Any) -> Any:
        arrays, structure = jax.tree.flatten(operands)
        if not any(isinstance(x, Tracer) for x in arrays):
            return self.fn(*operands)
        arrays = varying_together(map(jnp.asarray, arrays))

        def rule(primals: Any, tangents: Any) -> Any:
            unflatten = structure.unflatten
            return self.rule(unflatten(primals), unflatten(tangents))

        traced = jax.make_jaxpr(lambda *x: self.fn(*structure.unflatten(x)))(*arrays)
        return _kept_p.bind(*arrays, call_jaxpr=traced, rule=rule)


own_derivative: Any = _OwnDerivative if FORGETS_DERIVATIVE_RULES else jax.custom_jvp
"""A decorator that is used as ``jax.custom_jvp`` is."""


@_kept_p.def_impl
def _inlined(*arrays: Any, call_jaxpr: Any, rule: Any) -> Any:
    return jaxpr_as_fun(call_jaxpr)(*arrays)[0]


@_kept_p.def_abstract_eval
def _aval(*_: Any, call_jaxpr: Any, rule: Any) -> Any:
    return call_jaxpr.out_avals[0]


def _push(primals: Any, tangents: Any, *, call_jaxpr: Any, rule: Any) -> Any:
    pushed = [
        ad.instantiate_zeros(t) if is_inexact(x) else None
        for x, t in zip(primals, tangents, strict=True)
    ]
    return rule(primals, pushed)


def in_rows(arrays: Sequence[Any], dims: Sequence[Any]) -> list[Any]:
    """Return arrays of a batch with its rows in front; an array without any gets copies."""
    size = next(x.shape[d] for x, d in zip(arrays, dims, strict=True) if d is not None)
    return [batching.bdim_at_front(x, d, size) for x, d in zip(arrays, dims, strict=True)]


def _batch(arrays: Any, dims: Any, *, call_jaxpr: Any, rule: Any) -> Any:
    rows = in_rows(arrays, dims)
    traced = jax.make_jaxpr(jax.vmap(jaxpr_as_fun(call_jaxpr)))(*rows)
    return _kept_p.bind(*rows, call_jaxpr=traced, rule=jax.vmap(rule)), 0


def _transpose(cotangent: Any, *arrays: Any, call_jaxpr: Any, rule: Any) -> list[Any]:
    """Transpose the function, where it is linear in some of its operands."""
    places = [i for i, x in enumerate(arrays) if ad.is_undefined_primal(x)]
    if type(cotangent) is ad.Zero:
        return [ad.Zero(x.aval) if i in places else None for i, x in enumerate(arrays)]

    def linear(*chosen: Any) -> Any:
        full = list(arrays)
        for i, x in zip(places, chosen, strict=True):
            full[i] = x
        return jaxpr_as_fun(call_jaxpr)(*full)[0]

    found = iter(jax.linear_transpose(linear, *[arrays[i].aval for i in places])(cotangent))
    return [next(found) if i in places else None for i in range(len(arrays))]


def _expand(primals: Any, series: Any, *, call_jaxpr: Any, rule: Any) -> Any:
    """Give Taylor series (``jax.experimental.jet``) those of the function's operators."""
    return jet.jet(lambda *x: jaxpr_as_fun(call_jaxpr)(*x)[0], primals, series)


ad.primitive_jvps[_kept_p] = _push
ad.primitive_transposes[_kept_p] = _transpose
batching.primitive_batchers[_kept_p] = _batch
mlir.register_lowering(_kept_p, mlir.lower_fun(_inlined, multiple_results=False))
jet.jet_rules[_kept_p] = _expand
