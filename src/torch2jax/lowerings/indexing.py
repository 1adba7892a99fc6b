"""Gather, scatter and losses of class labels take elements by their places.

Negative places count from the end. A place out of bounds is an error in PyTorch. XLA cannot raise,
so JAX's rule holds: a read gives NaN or the extreme value, and a write is dropped.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from .derivative_rules import own_derivative
from .promotion import cast, default_int, is_inexact, wide
from .registry import DataDependentShape, lowering


def _wrapped(index: Any, size: int) -> Any:
    return jnp.where(index < 0, index + size, index)


def _places(self: Any, indices: Any) -> tuple[Any, ...]:
    """Return PyTorch's list of indices, with None for a whole dimension, as NumPy's.

    Where the indices are not adjacent both libraries put the indexed dimensions first.
    """
    full = [slice(None) if i is None else i for i in indices]
    return tuple(full)


@lowering("index.Tensor", "_unsafe_index.Tensor")
def index(self: Any, indices: Any) -> Any:
    return self[_places(self, indices)]


_OF_BOOLS = {"add": "max", "multiply": "min"}
"""A sum of booleans is true where one of them is, and a product where all are."""


def _summed(x: Any) -> str:
    return "max" if x.dtype == np.bool_ else "add"


@lowering("index_put", "_unsafe_index_put")
def index_put(self: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    at = self.at[_places(self, indices)]
    values = cast(values, self.dtype)
    return getattr(at, _summed(self) if accumulate else "set")(values)


@lowering("_index_put_impl")
def index_put_impl(
    self: Any, indices: Any, values: Any, accumulate: bool = False, unsafe: bool = False
) -> Any:
    return index_put(self, indices, values, accumulate)


@lowering("index_select")
def index_select(self: Any, dim: int, index: Any) -> Any:
    if index.ndim > 1:
        raise IndexError("index_select(): Index is supposed to be a vector")
    if self.ndim == 0:
        return self
    return jnp.take(self, index.reshape(-1), axis=dim)


@lowering("take")
def take(self: Any, index: Any) -> Any:
    return self.reshape(-1)[index]


@lowering("put")
def put(self: Any, index: Any, source: Any, accumulate: bool = False) -> Any:
    flat = self.reshape(-1).at[index.reshape(-1)]
    written = getattr(flat, _summed(self) if accumulate else "set")(source.reshape(-1))
    return written.reshape(self.shape)


@lowering("gather")
def gather(self: Any, dim: int, index: Any, *, sparse_grad: bool = False) -> Any:
    if not index.size:  # it may have any number of dimensions
        return index.astype(self.dtype)
    if self.ndim == 0 or index.ndim == 0:
        return jnp.broadcast_to(self.reshape(-1)[0], index.shape)
    return self[_along(index, dim)]


def _along(index: Any, dim: int) -> tuple[Any, ...]:
    """Return indices of all dimensions, where ``index`` is along one and may be smaller."""
    dim = dim % index.ndim
    return tuple(
        index if k == dim else lax.broadcasted_iota(np.int32, index.shape, k)
        for k in range(index.ndim)
    )


def _scatter(self: Any, dim: int, index: Any, src: Any, how: str) -> Any:
    if not index.size:
        return self
    scalar = self.ndim == 0
    x = self.reshape(1) if scalar else self
    index = index.reshape(1) if index.ndim == 0 else index
    if hasattr(src, "shape") and getattr(src, "ndim", 0):
        src = src[tuple(slice(n) for n in index.shape)]
    src = jnp.broadcast_to(cast(src, self.dtype), index.shape)
    places = _along(index, dim)
    if self.dtype == np.bool_:
        how = _OF_BOOLS.get(how, how)
    if how == "multiply":
        return _multiplied(x, places, src).reshape(self.shape)
    return getattr(x.at[places], how)(src).reshape(self.shape)


@own_derivative
def _multiplied(x: Any, places: tuple[Any, ...], factors: Any) -> Any:
    return x.at[places].multiply(factors)


@_multiplied.defjvp
def _multiplied_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Differentiate the products of a scan: JAX has no derivative where places meet."""
    x, places, factors = primals
    x_dot, _, factors_dot = tangents
    return jax.jvp(
        lambda x, factors: _multiplied_by_scan(x, places, factors),
        (x, factors),
        (x_dot, factors_dot),
    )


def _multiplied_by_scan(x: Any, places: tuple[Any, ...], factors: Any) -> Any:
    """Sort the factors by the element that they belong to, and multiply each run.

    No product is divided by a factor, so derivatives of all orders are right at factors of 0.
    """
    inside, element = jnp.array(True), jnp.zeros((), places[0].dtype)
    for place, size in zip(places, x.shape, strict=True):
        inside = inside & (place >= 0) & (place < size)
        element = element * size + place
    element = jnp.where(inside, element, x.size).reshape(-1)
    order = jnp.argsort(element)
    element, factors = element[order], cast(factors, wide(x.dtype)).reshape(-1)[order]
    starts = jnp.concatenate([jnp.array([True]), element[1:] != element[:-1]])

    def joined(a: Any, b: Any) -> Any:
        return jnp.where(b[1], b[0], a[0] * b[0]), a[1] | b[1]

    products, _ = lax.associative_scan(joined, (factors, starts))
    last = jnp.full((x.size + 1,), -1).at[element].max(jnp.arange(element.size))[: x.size]
    found = jnp.where(last >= 0, products[jnp.maximum(last, 0)], 1)
    return cast(x * found.reshape(x.shape), x.dtype)


@lowering("scatter.src", "scatter.value", scalars=("value",))
def scatter(self: Any, dim: int, index: Any, src: Any = None, **named: Any) -> Any:
    return _scatter(self, dim, index, named.get("value", src), "set")


@lowering("scatter.reduce", "scatter.value_reduce", scalars=("value",))
def scatter_with(self: Any, dim: int, index: Any, src: Any, *, reduce: str) -> Any:
    return _scatter(self, dim, index, src, {"add": "add", "multiply": "multiply"}[reduce])


@lowering("scatter_add")
def scatter_add(self: Any, dim: int, index: Any, src: Any) -> Any:
    return _scatter(self, dim, index, src, "add")


_METHODS = {"sum": "add", "mean": "add", "prod": "multiply", "amax": "max", "amin": "min"}
_START = {"sum": 0, "mean": 0, "prod": 1}


def _reduce_start(self: Any, reduce: str) -> Any:
    if reduce in _START:
        return _START[reduce]
    if is_inexact(self):
        return -jnp.inf if reduce == "amax" else jnp.inf
    info = jnp.iinfo(self.dtype)
    return info.min if reduce == "amax" else info.max


@lowering("scatter_reduce.two")
def scatter_reduce(
    self: Any, dim: int, index: Any, src: Any, reduce: str, *, include_self: bool = True
) -> Any:
    if not index.size:
        return self
    if self.dtype == bool:
        counts, src = self.astype(np.int32), jnp.asarray(src).astype(np.int32)
        out = scatter_reduce(counts, dim, index, src, reduce, include_self=include_self)
        return out.astype(bool)
    x = self
    if not include_self:
        start = cast(_reduce_start(self, reduce), self.dtype)
        x = _scatter(self, dim, index, start, "set")
    out = _scatter(x, dim, index, src, _METHODS[reduce])
    if reduce != "mean":
        return out
    ones = jnp.ones(self.shape, self.dtype) if include_self else jnp.zeros(self.shape, self.dtype)
    count = _scatter(ones, dim, index, cast(1, self.dtype), "add")
    count = jnp.maximum(count, 1)
    return out / count if is_inexact(self) else jnp.floor_divide(out, count)


@lowering("index_reduce")
def index_reduce(
    self: Any, dim: int, index: Any, source: Any, reduce: str, *, include_self: bool = True
) -> Any:
    if self.ndim == 0:
        self_1d, source = self.reshape(1), source.reshape(-1)
        return index_reduce(self_1d, 0, index, source, reduce, include_self=include_self).reshape(
            ()
        )
    dim = dim % self.ndim
    shape = [1] * self.ndim
    shape[dim] = index.size
    places = jnp.broadcast_to(index.reshape(shape), source.shape)
    return scatter_reduce(self, dim, places, source, reduce, include_self=include_self)


@lowering("index_add", scalars=("alpha",))
def index_add(self: Any, dim: int, index: Any, source: Any, *, alpha: Any = 1) -> Any:
    if self.ndim and source.ndim:
        at = dim % self.ndim
        expected = (*self.shape[:at], index.size, *self.shape[at + 1 :])
        if source.shape != expected:
            raise RuntimeError(
                "source tensor shape must match self tensor shape, excluding the specified "
                f"dimension. Got self.shape = {list(self.shape)} source.shape = "
                f"{list(source.shape)}, index.numel() = {index.size}"
            )
    source = cast(source, self.dtype) * cast(alpha, self.dtype)
    return _along_dim(self, dim, index, source, _summed(self))


@lowering("index_copy")
def index_copy(self: Any, dim: int, index: Any, source: Any) -> Any:
    return _along_dim(self, dim, index, source, "set")


@lowering("index_fill.int_Scalar", "index_fill.int_Tensor", scalars=("value",))
def index_fill(self: Any, dim: int, index: Any, value: Any) -> Any:
    return _along_dim(self, dim, index, cast(value, self.dtype), "set")


def _along_dim(self: Any, dim: int, index: Any, source: Any, how: str) -> Any:
    if self.ndim == 0:
        at = self.reshape(1).at[index.reshape(-1)]
        return getattr(at, how)(source.reshape(-1) if source.ndim else source).reshape(())
    place = (*([slice(None)] * (dim % self.ndim)), index.reshape(-1))
    return getattr(self.at[place], how)(source)


@lowering("masked_scatter")
def masked_scatter(self: Any, mask: Any, source: Any) -> Any:
    if mask.dtype != bool:
        raise RuntimeError("masked_scatter_ only supports boolean masks")
    mask, x = jnp.broadcast_arrays(mask, self)
    places = jnp.cumsum(mask.reshape(-1)) - 1
    taken = source.reshape(-1)[jnp.clip(places, 0, max(source.size - 1, 0))] if source.size else 0
    return jnp.where(mask.reshape(-1), taken, x.reshape(-1)).reshape(x.shape)


@lowering("masked_scatter_backward")
def masked_scatter_backward(grad_output: Any, mask: Any, sizes: Any) -> Any:
    """Return the source's gradient: where the k-th True stands, it took the k-th element."""
    mask, grad = (x.reshape(-1) for x in jnp.broadcast_arrays(mask, grad_output))
    size = int(np.prod(sizes))
    places = jnp.where(mask, jnp.cumsum(mask) - 1, size)
    found = jnp.zeros(size, grad.dtype).at[places].add(grad, mode="drop")
    return found.reshape(tuple(sizes))


@lowering("bucketize.Tensor", "bucketize.Scalar")
def bucketize(self: Any, boundaries: Any, *, out_int32: bool = False, right: bool = False) -> Any:
    side = "right" if right else "left"
    return jnp.searchsorted(boundaries, self, side=side).astype(
        np.int32 if out_int32 else default_int()
    )


# --- these results have shapes that depend on values ---------------------------------------------


@lowering("nonzero", eager=True)
def nonzero(self: Any) -> Any:
    _values_of(self, "nonzero")
    host = np.asarray(self)
    found = np.nonzero(host) if host.ndim else np.nonzero(host.reshape(1))
    places = np.stack(found, -1) if host.ndim else np.zeros((len(found[0]), 0))
    return jnp.asarray(places, default_int())


@lowering("masked_select", eager=True)
def masked_select(self: Any, mask: Any) -> Any:
    _values_of(mask, "masked_select")
    shape: Any = jnp.broadcast_shapes(self.shape, mask.shape)
    places = np.nonzero(np.broadcast_to(np.asarray(mask), shape).reshape(-1))[0]
    return jnp.broadcast_to(self, shape).reshape(-1)[places]


@lowering("repeat_interleave.Tensor", eager=True)
def repeat_interleave(repeats: Any, *, output_size: int | None = None) -> Any:
    if output_size is None:
        _values_of(repeats, "repeat_interleave")
        if (np.asarray(repeats) < 0).any():
            raise RuntimeError("repeats can not be negative")
    n = repeats.shape[0]
    return jnp.repeat(jnp.arange(n, dtype=default_int()), repeats, total_repeat_length=output_size)


def _values_of(x: Any, what: str) -> None:
    if isinstance(x, Tracer):
        raise DataDependentShape(what)


# --- losses of labels -----------------------------------------------------------------------------


def _label_loss(
    self: Any, target: Any, weight: Any, reduction: int, ignore_index: int
) -> tuple[Any, Any]:
    """Return minus the weighted value at each row's label along axis 1, and the total weight."""
    x = cast(self, wide(self.dtype))
    axis = 0 if x.ndim == 1 else 1
    target = target.astype(np.int32)
    valid = target != ignore_index
    safe = jnp.where(valid, target, 0)
    picked = -jnp.take_along_axis(x, jnp.expand_dims(safe, axis), axis).squeeze(axis)
    w = jnp.ones((), x.dtype) if weight is None else cast(weight, x.dtype)[safe]
    w = jnp.where(valid, w, 0)
    losses = jnp.where(valid, picked * w, 0)
    total = jnp.sum(w)
    if reduction == 0:
        return cast(losses, self.dtype), jnp.zeros((), self.dtype)
    loss = jnp.sum(losses)
    if reduction == 1:
        loss = loss / total
    return cast(loss, self.dtype), cast(total, self.dtype)


@lowering("nll_loss_forward", "nll_loss2d_forward")
def nll_loss_forward(self: Any, target: Any, weight: Any, reduction: int, ignore_index: int) -> Any:
    return _label_loss(self, target, weight, reduction, ignore_index)


@lowering("nll_loss_backward", "nll_loss2d_backward")
def nll_loss_backward(
    grad_output: Any,
    self: Any,
    target: Any,
    weight: Any,
    reduction: int,
    ignore_index: int,
    total_weight: Any,
) -> Any:
    def loss(x: Any) -> Any:
        return _label_loss(x, target, weight, reduction, ignore_index)[0]

    return jax.linear_transpose(loss, self)(grad_output)[0]
