"""These operators choose one of several values, bound values, or mix them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from .._compat.torch import SHARES_TIES
from .promotion import cast, category, is_inexact, promote, result_dtype, wide
from .registry import lowering

Fn = Callable[..., Any]


@lowering(
    "where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar", "prims.where",
    scalars=True,
)  # fmt: skip
def where(condition: Any, self: Any, other: Any) -> Any:
    return jnp.where(condition != 0, *promote(self, other))


@lowering("masked_fill.Scalar", "masked_fill.Tensor", scalars=True)
def masked_fill(self: Any, mask: Any, value: Any) -> Any:
    return jnp.where(mask, cast(value, self.dtype), self)


def _cut(x: Any, bound: Any, cuts: Any, extreme: Fn) -> Any:
    """Take an extreme of both. Where they are equal ``x`` gets the derivative; NaN stays NaN."""
    if not is_inexact(x):
        return extreme(x, bound)
    return jnp.where(cuts(x, bound), bound, jnp.where(jnp.isnan(bound), bound, x))


def _clamp(self: Any, min: Any, max: Any, at_least: Fn, at_most: Fn) -> Any:
    given = [x for x in (min, max) if x is not None]
    dtype = result_dtype(self, *given)
    x = cast(self, dtype)
    if min is not None:
        x = at_least(x, cast(min, dtype))
    if max is not None:
        x = at_most(x, cast(max, dtype))
    return x


@lowering("clamp", scalars=True)
def clamp(self: Any, min: Any = None, max: Any = None) -> Any:
    """Cut at numbers. From PyTorch 2.14 on an operand that is equal to one has the derivative 0."""
    below, above = (jnp.less_equal, jnp.greater_equal) if SHARES_TIES else (jnp.less, jnp.greater)
    return _clamp(
        *(self, min, max),
        lambda x, bound: _cut(x, bound, below, jnp.maximum),
        lambda x, bound: _cut(x, bound, above, jnp.minimum),
    )


@lowering("clamp.Tensor", scalars=True)
def clamp_by_tensors(self: Any, min: Any = None, max: Any = None) -> Any:
    """Cut at tensors. From PyTorch 2.14 on equal elements share the derivative, as in JAX."""
    if SHARES_TIES:
        return _clamp(self, min, max, jnp.maximum, jnp.minimum)
    return _clamp(
        *(self, min, max),
        lambda x, bound: _cut(x, bound, jnp.less, jnp.maximum),
        lambda x, bound: _cut(x, bound, jnp.greater, jnp.minimum),
    )


@lowering("clamp_min", scalars=True)
def clamp_min(self: Any, min: Any) -> Any:
    return clamp(self, min)


@lowering("clamp_min.Tensor", scalars=True)
def clamp_min_by_tensor(self: Any, min: Any) -> Any:
    return clamp_by_tensors(self, min)


@lowering("clamp_max", scalars=True)
def clamp_max(self: Any, max: Any) -> Any:
    return clamp(self, None, max)


@lowering("clamp_max.Tensor", scalars=True)
def clamp_max_by_tensor(self: Any, max: Any) -> Any:
    return clamp_by_tensors(self, None, max)


@lowering("lerp.Scalar", "lerp.Tensor", scalars=True)
def lerp(self: Any, end: Any, weight: Any) -> Any:
    compute = wide(result_dtype(self, end))
    a, b = cast(self, compute), cast(end, compute)
    w = cast(weight, compute)
    return cast(jnp.where(abs(w) < 0.5, a + w * (b - a), b - (b - a) * (1 - w)), self.dtype)


@lowering("addcmul", scalars=True)
def addcmul(self: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    dtype = result_dtype(self, tensor1, tensor2)
    a, b, c, v = (cast(x, wide(dtype)) for x in (self, tensor1, tensor2, value))
    return cast(a + v * b * c, dtype)


@lowering("addcdiv", scalars=True)
def addcdiv(self: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    dtype = result_dtype(self, tensor1, tensor2)
    if category(dtype) < 2:
        raise RuntimeError("Integer division with addcdiv is no longer supported.")
    a, b, c, v = (cast(x, wide(dtype)) for x in (self, tensor1, tensor2, value))
    return cast(a + v * (b / c), dtype)


@lowering("complex")
def complex_(real: Any, imag: Any) -> Any:
    if real.dtype != imag.dtype:
        raise RuntimeError(f"complex expects parts of one dtype, got {real.dtype} and {imag.dtype}")
    return lax.complex(*jnp.broadcast_arrays(*promote(real, imag)))


@lowering("polar")
def polar(abs: Any, angle: Any) -> Any:
    return lax.complex(abs * jnp.cos(angle), abs * jnp.sin(angle))
