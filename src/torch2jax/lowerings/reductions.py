"""Many values to few: sums, extremes, moments, and scans.

They stand in one file because all share the reading of PyTorch's ``dim`` and ``keepdim`` arguments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from .promotion import (
    carried,
    cast,
    default_int,
    dims_of,
    floating,
    is_inexact,
    kind,
    real_of,
    wide,
)
from .registry import lowering
from .unary import abs_


def _accumulated(x: Any, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """The operand in the dtype that is added up in, and the result's dtype."""
    natural = x.dtype if is_inexact(x) else default_int()
    out = natural if dtype is None else carried(dtype)
    return cast(x, wide(out)), out


@lowering("sum", "sum.dim_IntList")
def sum_(self: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    x, out = _accumulated(self, dtype)
    return cast(jnp.sum(x, dims_of(x, dim), keepdims=keepdim), out)


@lowering("prims.sum")
def prims_sum(inp: Any, dims: Any, *, output_dtype: Any = None) -> Any:
    x, out = _accumulated(inp, output_dtype)
    return cast(jnp.sum(x, tuple(dims or ())), out)


@lowering("prims.prod")
def prims_prod(inp: Any, dims: Any, *, output_dtype: Any = None) -> Any:
    x, out = _accumulated(inp, output_dtype)
    return cast(jnp.prod(x, tuple(dims or ())), out)


@lowering("prims.amax")
def prims_amax(inp: Any, dims: Any, *, output_dtype: Any = None) -> Any:
    return jnp.max(inp, tuple(dims or ()))


@lowering("prims.amin")
def prims_amin(inp: Any, dims: Any, *, output_dtype: Any = None) -> Any:
    return jnp.min(inp, tuple(dims or ()))


@lowering("prims.var")
def prims_var(inp: Any, dims: Any, correction: Any = 1, *, output_dtype: Any = None) -> Any:
    return var(inp, dims, correction=correction)


@lowering("nansum")
def nansum(self: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    x, out = _accumulated(self, dtype)
    return cast(jnp.nansum(x, dims_of(x, dim), keepdims=keepdim), out)


@lowering("prod", "prod.dim_int")
def prod(self: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    x, out = _accumulated(self, dtype)
    return cast(jnp.prod(x, dims_of(x, dim), keepdims=keepdim), out)


@lowering("mean", "mean.dim")
def mean(self: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    out = carried(dtype) if dtype is not None else self.dtype
    if kind(out) < 2:
        raise RuntimeError(
            "mean(): could not infer output dtype. Input dtype must be either a floating point or "
            f"complex dtype. Got: {out}"
        )
    x = cast(self, wide(out))
    axes = dims_of(x, dim)
    return cast(_mean(x, axes, keepdim), out)


def _mean(x: Any, axes: tuple[int, ...], keepdim: bool) -> Any:
    n = math.prod(x.shape[a] for a in axes)
    total = jnp.sum(x, axes, keepdims=keepdim)
    return total * jnp.nan if n == 0 else total / n


def _moments(x: Any, dim: Any, correction: Any, keepdim: bool) -> tuple[Any, Any]:
    """Variance and mean."""
    axes = dims_of(x, dim)
    correction = 1 if correction is None else correction
    n = math.prod(x.shape[a] for a in axes)
    mean = _mean(x, axes, True)
    off = x - mean
    squares = (off * jnp.conj(off)).real if kind(x.dtype) == 3 else off * off
    # A sample too small for the correction gives NaN (0/0) or inf, as in PyTorch.
    total = jnp.sum(squares, axes, keepdims=keepdim)
    degrees = max(n - correction, 0)
    variance = total / degrees if degrees else total / jnp.zeros((), total.dtype)
    return variance, mean if keepdim else jnp.squeeze(mean, axes)


@lowering("var.correction")
def var(self: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    out = real_of(self.dtype)
    return cast(_moments(cast(self, wide(self.dtype)), dim, correction, keepdim)[0], out)


@lowering("std.correction")
def std(self: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    v, _ = _moments(cast(self, wide(self.dtype)), dim, correction, keepdim)
    return cast(_deviation(v), real_of(self.dtype))


def _deviation(variance: Any) -> Any:
    """Its derivative is 0 where all values are the same, as in PyTorch."""
    zero = variance == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, variance)))


@lowering("var_mean.correction")
def var_mean(self: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    v, m = _moments(cast(self, wide(self.dtype)), dim, correction, keepdim)
    return cast(v, real_of(self.dtype)), cast(m, self.dtype)


@lowering("std_mean.correction")
def std_mean(self: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    v, m = _moments(cast(self, wide(self.dtype)), dim, correction, keepdim)
    return cast(_deviation(v), real_of(self.dtype)), cast(m, self.dtype)


@lowering("all", "all.dim", "all.dims")
def all_(self: Any, dim: Any = None, keepdim: bool = False) -> Any:
    out = jnp.all(self != 0, dims_of(self, dim), keepdims=keepdim)
    return out.astype(np.uint8) if self.dtype == np.uint8 else out


@lowering("any", "any.dim", "any.dims")
def any_(self: Any, dim: Any = None, keepdim: bool = False) -> Any:
    out = jnp.any(self != 0, dims_of(self, dim), keepdims=keepdim)
    return out.astype(np.uint8) if self.dtype == np.uint8 else out


@lowering("count_nonzero", "count_nonzero.dim_IntList")
def count_nonzero(self: Any, dim: Any = None) -> Any:
    return jnp.sum(self != 0, dims_of(self, dim), dtype=default_int())


# --- extremes ------------------------------------------------------------------------------------


def _check_not_empty(x: Any, axes: tuple[int, ...], name: str) -> None:
    if any(x.shape[a] == 0 for a in axes):
        raise IndexError(f"{name}(): Expected reduction dim to be specified for input.numel() == 0")


@lowering("amax")
def amax(self: Any, dim: Any = (), keepdim: bool = False) -> Any:
    _check_not_empty(self, dims_of(self, dim), "amax")
    return jnp.max(self, dims_of(self, dim), keepdims=keepdim)


@lowering("amin")
def amin(self: Any, dim: Any = (), keepdim: bool = False) -> Any:
    _check_not_empty(self, dims_of(self, dim), "amin")
    return jnp.min(self, dims_of(self, dim), keepdims=keepdim)


@lowering("max")
def max_(self: Any) -> Any:
    return amax(self)


@lowering("min")
def min_(self: Any) -> Any:
    return amin(self)


@lowering("aminmax")
def aminmax(self: Any, *, dim: Any = None, keepdim: bool = False) -> Any:
    return amin(self, dim, keepdim), amax(self, dim, keepdim)


def _arg(x: Any, dim: int, keepdim: bool, find: Callable[..., Any]) -> Any:
    if x.ndim == 0:
        return jnp.zeros((), default_int())
    if x.dtype == bool:
        x = x.astype(np.int8)
    return find(x, dim, keepdims=keepdim).astype(default_int())


def _picked(x: Any, places: Any, dim: int, keepdim: bool) -> Any:
    if x.ndim == 0:
        return x
    values = jnp.take_along_axis(x, places, dim, mode="clip")
    return values if keepdim else values.squeeze(dim)


def _extreme(x: Any, dim: int, keepdim: bool, find: Callable[..., Any]) -> Any:
    """Values and places. The values come by the places, so the derivative goes to one of them."""
    if x.ndim:
        _check_not_empty(x, (dim % x.ndim,), "max")
    places = _arg(x, dim, True, find)
    values = _picked(x, places, dim, keepdim)
    return values, places if keepdim or x.ndim == 0 else places.squeeze(dim)


@lowering("max.dim")
def max_dim(self: Any, dim: int, keepdim: bool = False) -> Any:
    return _extreme(self, dim, keepdim, jnp.argmax)


@lowering("min.dim")
def min_dim(self: Any, dim: int, keepdim: bool = False) -> Any:
    return _extreme(self, dim, keepdim, jnp.argmin)


@lowering("argmax")
def argmax(self: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    return _arg_any(self, dim, keepdim, jnp.argmax)


@lowering("argmin")
def argmin(self: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    return _arg_any(self, dim, keepdim, jnp.argmin)


def _arg_any(x: Any, dim: int | None, keepdim: bool, find: Callable[..., Any]) -> Any:
    if dim is None:
        _check_not_empty(x, tuple(range(x.ndim)), "argmax")
        out = _arg(x.reshape(-1), 0, False, find) if x.ndim else _arg(x, 0, False, find)
        return out.reshape((1,) * x.ndim) if keepdim else out
    if x.ndim:
        _check_not_empty(x, (dim % x.ndim,), "argmax")
    return _arg(x, dim, keepdim, find)


@lowering("topk")
def topk(self: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if self.ndim == 0:
        return self, jnp.zeros((), default_int())
    x = jnp.moveaxis(self, dim, -1)
    order = _order(x, largest)[..., :k]
    values = jnp.take_along_axis(x, order, -1)
    return jnp.moveaxis(values, -1, dim), jnp.moveaxis(order, -1, dim).astype(default_int())


def _order(x: Any, descending: bool) -> Any:
    """A stable order of the last axis; NaN counts as the largest."""
    x = lax.stop_gradient(x)
    if x.dtype == bool:
        x = x.astype(np.int8)
    return jnp.argsort(x, axis=-1, stable=True, descending=descending)


@lowering("sort", "sort.stable")
def sort(self: Any, dim: int = -1, descending: bool = False, *, stable: bool | None = None) -> Any:
    if self.ndim == 0:
        return self, jnp.zeros((), default_int())
    x = jnp.moveaxis(self, dim, -1)
    order = _order(x, descending)
    values = jnp.take_along_axis(x, order, -1)
    return jnp.moveaxis(values, -1, dim), jnp.moveaxis(order, -1, dim).astype(default_int())


@lowering("kthvalue")
def kthvalue(self: Any, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    if self.ndim == 0:
        return self, jnp.zeros((), default_int())
    order = jnp.take(_order(jnp.moveaxis(self, dim, -1), False), k - 1, axis=-1)
    return _at_places(self, order, dim, keepdim)


@lowering("median.dim")
def median_dim(self: Any, dim: int, keepdim: bool = False) -> Any:
    if self.ndim == 0:
        return self, jnp.zeros((), default_int())
    x = jnp.moveaxis(self, dim, -1)
    n = x.shape[-1]
    order = _order(x, False)
    place = order[..., (n - 1) // 2]
    if is_inexact(x):  # one NaN makes it NaN: the first of them
        bad = jnp.isnan(x)
        place = jnp.where(bad.any(-1), jnp.argmax(bad, -1), place)
    return _at_places(self, place, dim, keepdim)


def _at_places(x: Any, places: Any, dim: int, keepdim: bool) -> Any:
    places = jnp.expand_dims(places, dim % x.ndim).astype(default_int())
    values = jnp.take_along_axis(x, places, dim)
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


@lowering("median")
def median(self: Any) -> Any:
    return _middle(self, median_dim)


@lowering("nanmedian.dim")
def nanmedian_dim(self: Any, dim: int, keepdim: bool = False) -> Any:
    if self.ndim == 0:
        return self, jnp.zeros((), default_int())
    x = jnp.moveaxis(self, dim, -1)
    count = jnp.sum(~jnp.isnan(x), -1) if is_inexact(x) else jnp.full(x.shape[:-1], x.shape[-1])
    middle = jnp.maximum(count - 1, 0) // 2
    place = jnp.take_along_axis(_order(x, False), middle[..., None], -1)[..., 0]
    return _at_places(self, place, dim, keepdim)


@lowering("nanmedian")
def nanmedian(self: Any) -> Any:
    return _middle(self, nanmedian_dim)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _middle(x: Any, median_of: Any) -> Any:
    return median_of(x.reshape(-1), 0)[0]


@_middle.defjvp
def _middle_jvp(median_of: Any, primals: Any, tangents: Any) -> Any:
    """The derivative is shared by all values that are the median."""
    (x,), (dx,) = primals, tangents
    value = _middle(x, median_of)
    same = (x == value) | (jnp.isnan(x) & jnp.isnan(value))
    return value, jnp.sum(jnp.where(same, dx, 0)) / jnp.sum(same).astype(dx.dtype)


# --- norms ---------------------------------------------------------------------------------------


@lowering("linalg_vector_norm")
def vector_norm(
    self: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    out = real_of(carried(dtype) if dtype is not None else self.dtype)
    x = cast(self, carried(dtype)) if dtype is not None else self
    axes = dims_of(x, dim)
    x = x if kind(x.dtype) == 3 else cast(x, wide(x.dtype))
    return cast(norm(x, float(ord), axes, keepdim), out)


def norm(x: Any, ord: float, axes: tuple[int, ...], keepdim: bool = False) -> Any:
    """Of the sizes of ``x`` along axes. Where a derivative is infinite or undefined it is 0."""
    size = abs_(x)
    if ord == float("inf"):
        return jnp.max(size, axes, keepdims=keepdim)
    if ord == float("-inf"):
        return jnp.min(size, axes, keepdims=keepdim)
    if ord == 0:
        return jnp.sum((size != 0).astype(size.dtype), axes, keepdims=keepdim)
    if ord == 1:
        return jnp.sum(size, axes, keepdims=keepdim)
    zero = size == 0
    powers = size * size if ord == 2 else jnp.where(zero, 0, jnp.where(zero, 1, size) ** ord)
    total = jnp.sum(powers, axes, keepdims=keepdim)
    none = jnp.any(zero, axes, keepdims=keepdim) if ord < 0 else total == 0
    return jnp.where(none, 0.0, _root(jnp.where(none, 1, total), ord))


def _root(x: Any, ord: float) -> Any:
    return jnp.sqrt(x) if ord == 2 else x ** (1 / ord)


@lowering("logsumexp")
def logsumexp(self: Any, dim: Any, keepdim: bool = False) -> Any:
    dtype = floating(self.dtype)
    x = cast(self, wide(dtype))
    return cast(jax.nn.logsumexp(x, dims_of(x, dim), keepdims=keepdim), dtype)


# --- scans ---------------------------------------------------------------------------------------


@lowering("cumsum")
def cumsum(self: Any, dim: int, *, dtype: Any = None) -> Any:
    x, out = _accumulated(self, dtype)
    return cast(jnp.cumsum(x, dim) if x.ndim else x, out)


@lowering("cumprod")
def cumprod(self: Any, dim: int, *, dtype: Any = None) -> Any:
    x, out = _accumulated(self, dtype)
    return cast(jnp.cumprod(x, dim) if x.ndim else x, out)


@lowering("logcumsumexp")
def logcumsumexp(self: Any, dim: int) -> Any:
    if self.ndim == 0:
        return self
    x = cast(self, wide(self.dtype))
    if kind(x.dtype) == 3:
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
    """A NaN stays until another one comes."""
    return jnp.isnan(b) | (better & ~jnp.isnan(a)) if is_inexact(b) else better


@lowering("cummax")
def cummax(self: Any, dim: int) -> Any:
    return _running(self, dim, lambda b, a: _beats(b, a, b >= a))


@lowering("cummin")
def cummin(self: Any, dim: int) -> Any:
    return _running(self, dim, lambda b, a: _beats(b, a, b <= a))
