"""Reductions make few values of many: sums, moments, all, any, and norms."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .promotion import (
    array_dtype,
    cast,
    category,
    default_int,
    dims_of,
    floating,
    is_inexact,
    real_of,
    wide,
)
from .registry import lowering
from .unary import abs_


def accumulated(x: Any, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Return the operand in the dtype of the sum, and the result's dtype."""
    natural = x.dtype if is_inexact(x) else default_int()
    out = natural if dtype is None else array_dtype(dtype)
    return cast(x, wide(out)), out


@lowering("sum", "sum.dim_IntList")
def sum_(self: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    x, out = accumulated(self, dtype)
    return cast(jnp.sum(x, dims_of(x, dim), keepdims=keepdim), out)


def _axes(x: Any, dims: Any) -> tuple[int, ...]:
    """Return the axes of a reduction; a number has none, although its dimension may be named."""
    return tuple(dims or ()) if x.ndim else ()


@lowering("prims.sum")
def prims_sum(inp: Any, dims: Any, *, output_dtype: Any = None) -> Any:
    x, out = accumulated(inp, output_dtype)
    return cast(jnp.sum(x, _axes(inp, dims)), out)


@lowering("prims.prod")
def prims_prod(inp: Any, dims: Any, *, output_dtype: Any = None) -> Any:
    x, out = accumulated(inp, output_dtype)
    return cast(jnp.prod(x, _axes(inp, dims)), out)


@lowering("prims.amax")
def prims_amax(inp: Any, dims: Any, *, output_dtype: Any = None) -> Any:
    return _as_asked(jnp.max(inp, _axes(inp, dims)), output_dtype)


@lowering("prims.amin")
def prims_amin(inp: Any, dims: Any, *, output_dtype: Any = None) -> Any:
    return _as_asked(jnp.min(inp, _axes(inp, dims)), output_dtype)


@lowering("prims.var")
def prims_var(inp: Any, dims: Any, correction: Any = 1, *, output_dtype: Any = None) -> Any:
    return _as_asked(var(inp, dims, correction=correction), output_dtype)


def _as_asked(x: Any, dtype: Any) -> Any:
    return x if dtype is None else cast(x, array_dtype(dtype))


@lowering("nansum")
def nansum(self: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    x, out = accumulated(self, dtype)
    return cast(jnp.nansum(x, dims_of(x, dim), keepdims=keepdim), out)


@lowering("prod", "prod.dim_int")
def prod(self: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    x, out = accumulated(self, dtype)
    return cast(jnp.prod(x, dims_of(x, dim), keepdims=keepdim), out)


@lowering("mean", "mean.dim")
def mean(self: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    out = array_dtype(dtype) if dtype is not None else self.dtype
    if category(out) < 2:
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
    """Return variance and mean."""
    axes = dims_of(x, dim)
    correction = 1 if correction is None else correction
    n = math.prod(x.shape[a] for a in axes)
    mean = _mean(x, axes, True)
    off = x - mean
    squares = (off * jnp.conj(off)).real if category(x.dtype) == 3 else off * off
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
    """Return the root, whose derivative is 0 where all values are the same, as in PyTorch."""
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


def _some_dims(x: Any, dim: Any) -> tuple[int, ...]:
    """Return the axes of ``dim=`` for ``all`` and ``any``, to which empty means none."""
    return () if isinstance(dim, list | tuple) and not dim else dims_of(x, dim)


@lowering("all", "all.dim", "all.dims")
def all_(self: Any, dim: Any = None, keepdim: bool = False) -> Any:
    out = jnp.all(self != 0, _some_dims(self, dim), keepdims=keepdim)
    return out.astype(np.uint8) if self.dtype == np.uint8 else out


@lowering("any", "any.dim", "any.dims")
def any_(self: Any, dim: Any = None, keepdim: bool = False) -> Any:
    out = jnp.any(self != 0, _some_dims(self, dim), keepdims=keepdim)
    return out.astype(np.uint8) if self.dtype == np.uint8 else out


@lowering("count_nonzero", "count_nonzero.dim_IntList")
def count_nonzero(self: Any, dim: Any = None) -> Any:
    return jnp.sum(self != 0, dims_of(self, dim), dtype=default_int())


# --- norms ---------------------------------------------------------------------------------------


@lowering("linalg_vector_norm")
def vector_norm(
    self: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    out = real_of(array_dtype(dtype) if dtype is not None else self.dtype)
    x = cast(self, array_dtype(dtype)) if dtype is not None else self
    axes = dims_of(x, dim)
    x = x if category(x.dtype) == 3 else cast(x, wide(x.dtype))
    return cast(norm(x, float(ord), axes, keepdim), out)


def norm(x: Any, ord: float, axes: tuple[int, ...], keepdim: bool = False) -> Any:
    """Return a norm along axes. Where its derivative is infinite or undefined it is set to 0."""
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
    if ord == 2:  # of x itself, since |x| has no second derivative at 0
        powers = x.real**2 + x.imag**2 if category(x.dtype) == 3 else x * x
    else:
        powers = jnp.where(zero, 0, jnp.where(zero, 1, size) ** ord)
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
