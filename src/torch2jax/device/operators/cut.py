"""What PyTorch computes without gradients is a constant to JAX's derivative.

``jax.lax.stop_gradient`` says so. In a backward pass a primitive of our own does, so that
``tracing/written_derivatives.py`` finds one that computes with its cotangents without gradients.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.interpreters import ad, batching, mlir

from ..._compat.jax import Primitive
from ..thread_state import state

__all__ = ["constant", "cut", "is_cut"]

_PACKAGE = __name__.partition(".")[0]

_constant_p = Primitive(f"{_PACKAGE}_without_gradient")


def cut(x: Any) -> Any:
    """Return an array that is a constant to JAX's derivative."""
    return constant(x) if state.backward_passes else jax.lax.stop_gradient(x)


def constant(x: Any) -> Any:
    """Return an array that is a constant to JAX's derivative, and that can be transposed."""
    return _constant_p.bind(x)


def is_cut(primitive: Any) -> bool:
    """Say whether an equation of this primitive is made by ``constant``."""
    return primitive is _constant_p


@_constant_p.def_abstract_eval
@_constant_p.def_impl
def _same(x: Any) -> Any:
    return x


def _jvp(primals: Any, tangents: Any) -> Any:
    out = _constant_p.bind(*primals)
    return out, ad.Zero(jax.typeof(out).to_tangent_aval())


def _batch(operands: Any, dims: Any) -> Any:
    return _constant_p.bind(*operands), *dims


# These bind it again: where they run, the backward pass has been traced.
ad.primitive_jvps[_constant_p] = _jvp
ad.primitive_transposes[_constant_p] = lambda cotangent, _: [cotangent]
batching.primitive_batchers[_constant_p] = _batch
mlir.register_lowering(_constant_p, lambda _, x: [x])
