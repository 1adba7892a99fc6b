"""Scans compute running sums, products and extremes along a dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from .promotion import (
    cast,
    category,
    default_int,
    is_inexact,
    wide,
)
from .reductions import accumulated
from .registry import lowering


@lowering("cumsum")
def cumsum(self: Any, dim: int, *, dtype: Any = None) -> Any:
    x, out = accumulated(self, dtype)
    return cast(jnp.cumsum(x, dim) if x.ndim else x, out)


@lowering("cumprod")
def cumprod(self: Any, dim: int, *, dtype: Any = None) -> Any:
    x, out = accumulated(self, dtype)
    return cast(jnp.cumprod(x, dim) if x.ndim else x, out)


@lowering("logcumsumexp")
def logcumsumexp(self: Any, dim: int) -> Any:
    if self.ndim == 0:
        return self
    x = cast(self, wide(self.dtype))
    if category(x.dtype) == 3:
        return lax.associative_scan(jnp.logaddexp, x, axis=dim % x.ndim)
    return cast(lax.cumlogsumexp(x, dim % x.ndim), self.dtype)


def _running(x: Any, dim: int, better: Callable[[Any, Any], Any]) -> Any:
    if x.ndim == 0:
        return x, jnp.zeros((), default_int())
    dim = dim % x.ndim
    places = lax.broadcasted_iota(np.int32, x.shape, dim)

    def join(a: Any, b: Any) -> Any:
        take = better(b[0], a[0])
        return jnp.where(take, b[0], a[0]), jnp.where(take, b[1], a[1])

    _, where = lax.associative_scan(join, (lax.stop_gradient(x), places), axis=dim)
    return jnp.take_along_axis(x, where, dim), where.astype(default_int())


def _beats(b: Any, a: Any, better: Any) -> Any:
    """Say whether ``b`` replaces ``a``. A NaN stays until another one comes."""
    return jnp.isnan(b) | (better & ~jnp.isnan(a)) if is_inexact(b) else better


@lowering("cummax")
def cummax(self: Any, dim: int) -> Any:
    return _running(self, dim, lambda b, a: _beats(b, a, b >= a))


@lowering("cummin")
def cummin(self: Any, dim: int) -> Any:
    return _running(self, dim, lambda b, a: _beats(b, a, b <= a))
