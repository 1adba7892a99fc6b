"""Derivatives do not see a write to ``x.data`` or ``x.detach()``, or one while gradients are off.

Such a tensor has new values, and its derivative is still that of the old ones. A primitive says so,
and no ``jax.custom_jvp``, because JAX before 0.12 forgets the rule of one in a loop that is
differentiated twice.
"""

from __future__ import annotations

from typing import Any

from jax.interpreters import ad, batching, mlir

from .._compat.jax import Primitive, varying_together

__all__ = ["unseen"]

_PACKAGE = __name__.partition(".")[0]

_unseen_p = Primitive(f"{_PACKAGE}_unseen_write")


def unseen(old: Any, new: Any) -> Any:
    """Return the new values of a write, with the derivative of the old ones."""
    return _unseen_p.bind(*varying_together([old, new]))


@_unseen_p.def_abstract_eval
@_unseen_p.def_impl
def _new(old: Any, new: Any) -> Any:
    return new


def _follow(primals: Any, tangents: Any) -> Any:
    return _unseen_p.bind(*primals), tangents[0]


def _batch(given: Any, dims: Any) -> Any:
    size = next(x.shape[d] for x, d in zip(given, dims, strict=True) if d is not None)
    rows = [batching.bdim_at_front(x, d, size) for x, d in zip(given, dims, strict=True)]
    return _unseen_p.bind(*rows), 0


def _transpose(cotangent: Any, old: Any, new: Any) -> list[Any]:
    """Transpose the values, where a backward pass writes so and is transposed."""
    return [
        ad.Zero(old.aval) if ad.is_undefined_primal(old) else None,
        cotangent if ad.is_undefined_primal(new) else None,
    ]


ad.primitive_jvps[_unseen_p] = _follow
ad.primitive_transposes[_unseen_p] = _transpose
batching.primitive_batchers[_unseen_p] = _batch
mlir.register_lowering(_unseen_p, lambda _, old, new: [new])
