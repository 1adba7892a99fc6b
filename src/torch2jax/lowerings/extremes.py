"""These operators find largest, smallest and middle values, their places, and the order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from .derivative_rules import own_derivative
from .promotion import (
    default_int,
    dims_of,
    is_inexact,
)
from .registry import lowering


def _check_not_empty(x: Any, axes: tuple[int, ...], name: str) -> None:
    if any(x.shape[a] == 0 for a in axes):
        raise IndexError(f"{name}(): Expected reduction dim to be specified for input.numel() == 0")


def _check_has_elements(x: Any, name: str) -> None:
    if not x.size:
        raise RuntimeError(
            f"{name}(): Expected reduction dim to be specified for input.numel() == 0. Specify "
            "the reduction dim with the 'dim' argument."
        )


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
    _check_has_elements(self, "max")
    return amax(self)


@lowering("min")
def min_(self: Any) -> Any:
    _check_has_elements(self, "min")
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
    """Return values and places. The places pick the values, so one place gets the derivative."""
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
    """Return a stable order of the last axis; NaN counts as the largest."""
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
    if is_inexact(x):  # one NaN makes it NaN, at the place of the first one
        bad = jnp.isnan(x)
        place = jnp.where(bad.any(-1), jnp.argmax(bad, -1), place)
    return _at_places(self, place, dim, keepdim)


def _at_places(x: Any, places: Any, dim: int, keepdim: bool) -> Any:
    places = jnp.expand_dims(places, dim % x.ndim).astype(default_int())
    values = jnp.take_along_axis(x, places, dim)
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


@lowering("median")
def median(self: Any) -> Any:
    if not self.size:
        if self.dtype == bool:
            return jnp.ones((), bool)
        return jnp.full((), jnp.nan if is_inexact(self) else jnp.iinfo(self.dtype).min, self.dtype)
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
    if not self.size:
        return median(self)
    return _middle(self, nanmedian_dim)


def _middle(x: Any, median_of: Any) -> Any:
    @own_derivative
    def middle(x: Any) -> Any:
        return median_of(x.reshape(-1), 0)[0]

    @middle.defjvp
    def middle_jvp(primals: Any, tangents: Any) -> Any:
        """The derivative is shared by all values that are the median."""
        (x,), (dx,) = primals, tangents
        value = middle(x)
        same = (x == value) | (jnp.isnan(x) & jnp.isnan(value))
        return value, jnp.sum(jnp.where(same, dx, 0)) / jnp.sum(same).astype(dx.dtype)

    return middle(x)
