"""A getter returns what a view operator sees of an array, a setter the array after a write.

A setter takes the array that the operator was applied to and the new values of what it saw, and
returns the new array. ``view_chains`` says how operators follow each other.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .._conversions.dtypes import dtype_t2j
from .._conversions.small import widened
from .._errors import UnsupportedDtypeError
from .derivative_rules import own_derivative

aten = torch.ops.aten
Get = Callable[..., Any]


def scatter(get: Get, x: Any, value: Any) -> Any:
    """Set the elements of any view that selects elements, through the indices that it selects."""
    places = get(np.arange(x.size, dtype=np.int32).reshape(x.shape))
    return jnp.ravel(x).at[places].set(value).reshape(x.shape)


# --- shapes --------------------------------------------------------------------------------------


def resolved(size: Sequence[int], numel: int) -> tuple[int, ...]:
    """Return a shape with its -1 filled in."""
    if -1 not in size:
        return tuple(size)
    known = math.prod(s for s in size if s != -1)
    return tuple((numel // known if known else 0) if s == -1 else s for s in size)


def _reshape(x: Any, size: Sequence[int], *_: Any) -> Any:
    return x.reshape(resolved(size, x.size))


def _reshape_back(x: Any, value: Any, *_: Any) -> Any:
    return value.reshape(x.shape)


def _swap(x: Any, a: int = 0, b: int = 1) -> Any:
    return x if x.ndim == 0 else x.swapaxes(a, b)


def _t(x: Any) -> Any:
    return x if x.ndim < 2 else x.swapaxes(0, 1)


def _permute_back(x: Any, value: Any, dims: Sequence[int]) -> Any:
    order = np.argsort([d % x.ndim for d in dims]) if x.ndim else ()
    return value.transpose(tuple(int(i) for i in order))


def _squeeze_dims(x: Any, dims: Sequence[int]) -> tuple[int, ...]:
    return tuple({d % x.ndim for d in dims if x.shape[d] == 1}) if x.ndim else ()


def _unsqueeze(x: Any, dim: int) -> Any:
    dim = dim + x.ndim + 1 if dim < 0 else dim
    return x.reshape((*x.shape[:dim], 1, *x.shape[dim:]))


def _expand(x: Any, size: Sequence[int], implicit: bool = False) -> Any:
    lead = len(size) - x.ndim
    full = tuple(x.shape[i - lead] if s == -1 else s for i, s in enumerate(size))
    return x if full == x.shape else _module(x).broadcast_to(x, full)


def _module(x: Any) -> Any:
    """Return NumPy for NumPy arrays: ``scatter`` makes its indices outside of any trace."""
    return np if isinstance(x, np.ndarray) else jnp


# --- parts ---------------------------------------------------------------------------------------


def _at(x: Any, dim: int, item: Any) -> tuple[Any, ...]:
    return (*([slice(None)] * (dim % x.ndim)), item)


def _bounds(n: int, start: int | None, end: int | None, step: int) -> slice:
    first = 0 if start is None else start
    last = n if end is None or end == sys.maxsize else end  # n may be symbolic
    first = min(max(first + n if first < 0 else first, 0), n)
    last = min(max(last + n if last < 0 else last, first), n)
    return slice(first, last, step)


def slice_of(
    size: Sequence[int],
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> tuple[int, int, int, int]:
    """Return a slice of a tensor of this size as (dimension, start, number of elements, step)."""
    part = _bounds(size[dim], start, end, step)
    return dim, part.start, len(range(part.start, part.stop, step)), step


def _slice(
    x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    return x[_at(x, dim, _bounds(x.shape[dim], start, end, step))]


def _slice_back(
    x: Any,
    value: Any,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    return x.at[_at(x, dim, _bounds(x.shape[dim], start, end, step))].set(value)


def _select(x: Any, dim: int, index: int) -> Any:
    return x[_at(x, dim, index % x.shape[dim])]


def _select_back(x: Any, value: Any, dim: int, index: int) -> Any:
    return x.at[_at(x, dim, index % x.shape[dim])].set(value)


def _select_at(x: Any, start: Any, dim: int) -> Any:
    return jax.lax.dynamic_index_in_dim(x, start, dim, keepdims=False)


def _select_at_back(x: Any, value: Any, start: Any, dim: int) -> Any:
    return jax.lax.dynamic_update_index_in_dim(x, value, start, dim)


def _span(x: Any, start: Any, dim: int, count: int, step: int) -> Any:
    """Return all elements from a slice's first one to its last one."""
    return jax.lax.dynamic_slice_in_dim(x, start, (count - 1) * step + 1, dim)


def _slice_at(x: Any, start: Any, dim: int, count: int, step: int) -> Any:
    return _span(x, start, dim, count, step)[_at(x, dim, slice(None, None, step))]


def _slice_at_back(x: Any, value: Any, start: Any, dim: int, count: int, step: int) -> Any:
    if step > 1:
        part = _span(x, start, dim, count, step)
        value = part.at[_at(x, dim, slice(None, None, step))].set(value)
    return jax.lax.dynamic_update_slice_in_dim(x, value, start, dim)


def _parts(x: Any, sizes: Sequence[int], dim: int) -> list[slice]:
    ends = np.cumsum(sizes)
    return [slice(int(e - s), int(e)) for s, e in zip(sizes, ends, strict=True)]


def split_sizes(n: int, size: int) -> list[int]:
    if size == 0:
        return [0]
    return [min(size, n - i) for i in range(0, max(n, 1), size)]


def _split_with_sizes(x: Any, sizes: Sequence[int], dim: int = 0) -> list[Any]:
    return [x[_at(x, dim, part)] for part in _parts(x, sizes, dim)]


def _split_with_sizes_back(
    x: Any, value: Any, index: int, sizes: Sequence[int], dim: int = 0
) -> Any:
    return x.at[_at(x, dim, _parts(x, sizes, dim)[index])].set(value)


def _split(x: Any, size: int, dim: int = 0) -> list[Any]:
    return _split_with_sizes(x, split_sizes(x.shape[dim], size), dim)


def _split_back(x: Any, value: Any, index: int, size: int, dim: int = 0) -> Any:
    return _split_with_sizes_back(x, value, index, split_sizes(x.shape[dim], size), dim)


def _unbind(x: Any, dim: int = 0) -> list[Any]:
    return [x[_at(x, dim, i)] for i in range(x.shape[dim])]


def _unbind_back(x: Any, value: Any, index: int, dim: int = 0) -> Any:
    return x.at[_at(x, dim, index)].set(value)


def _diagonal(x: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    return _module(x).diagonal(x, offset, dim1, dim2)


def _unfold(x: Any, dim: int, size: int, step: int) -> Any:
    if x.ndim == 0:
        return x.reshape(1)[:size]
    dim = dim % x.ndim
    starts = np.arange(0, x.shape[dim] - size + 1, step)
    places = starts[:, None] + np.arange(size)
    picked = _module(x).take(x, places.reshape(-1).astype(np.int32), axis=dim)
    picked = picked.reshape((*x.shape[:dim], len(starts), size, *x.shape[dim + 1 :]))
    return _module(x).moveaxis(picked, dim + 1, -1)


def _as_strided(
    x: Any, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Any:
    """Return a view by strides of a whole cell, whose array is in row-major order."""
    places = np.full(size, offset or 0, dtype=np.int32)
    for k, (n, s) in enumerate(zip(size, stride, strict=True)):
        places += (np.arange(n, dtype=np.int32) * s).reshape(-1, *[1] * (len(size) - k - 1))
    if places.size and not 0 <= places.min() <= places.max() < x.size:
        raise RuntimeError(
            f"setStorage: sizes {list(size)}, strides {list(stride)}, storage offset {offset or 0} "
            f"are out of bounds for storage of {x.size} elements"
        )
    return x.reshape(-1)[places]


# --- other readings of the same memory -----------------------------------------------------------


def _parts_of_complex(x: Any) -> Any:
    return jnp.stack([x.real, x.imag], -1)


def _complex_of_parts(x: Any) -> Any:
    return jax.lax.complex(x[..., 0], x[..., 1])


def _bits(x: Any, dtype: torch.dtype) -> Any:
    wide = widened(x)
    if wide is not x and wide.dtype.kind == "f":
        raise UnsupportedDtypeError(
            f"view({dtype}) of a tensor of 4-bit floats: an array has one value in each element, "
            "and PyTorch packs two. x.float() has the values."
        )
    new, x = dtype_t2j(dtype), wide
    old_size, new_size = x.dtype.itemsize, new.itemsize
    if new_size == old_size:
        return _bitcast(x, new)
    if new_size < old_size:
        out = _bitcast(x, new)
        return out.reshape((*x.shape[:-1], x.shape[-1] * (old_size // new_size))) if x.ndim else out
    ratio = new_size // old_size
    return _bitcast(x.reshape((*x.shape[:-1], x.shape[-1] // ratio, ratio)), new)


def _bitcast(x: Any, dtype: Any) -> Any:
    if x.dtype == dtype:
        return x
    if x.dtype == np.bool_:
        return _bitcast(x.astype(np.uint8), dtype)
    if dtype == np.bool_:
        return _bitcast(x, np.dtype(np.uint8)).astype(bool)
    if x.dtype.kind == "c":
        parts = _parts_of_complex(x)
        wider = dtype.kind == "c" and dtype.itemsize > x.dtype.itemsize
        if x.ndim and (wider or dtype.itemsize <= parts.dtype.itemsize):
            parts = parts.reshape((*x.shape[:-1], 2 * x.shape[-1]))
        return _bitcast(parts, dtype)
    if dtype.kind == "c":
        half = np.dtype(np.float32 if dtype.itemsize == 8 else np.float64)
        ratio = half.itemsize // x.dtype.itemsize
        x = x.reshape((*x.shape[:-1], 2, ratio)) if ratio > 1 else x
        return _complex_of_parts(_bitcast(x, half))
    return jax.lax.bitcast_convert_type(x, dtype)


def _bits_back(x: Any, value: Any, dtype: torch.dtype) -> Any:
    wide = widened(x)
    if wide is not x:
        return _bits_back(wide, value, dtype).astype(x.dtype)
    old = x.dtype
    if value.dtype.itemsize == old.itemsize:
        return _bitcast(value, old)
    if value.dtype.itemsize > old.itemsize:
        return _bitcast(value, old).reshape(x.shape)
    return _bitcast(value.reshape((*x.shape, old.itemsize // value.dtype.itemsize)), old)


def _detached(x: Any) -> Any:
    return x if isinstance(x, np.ndarray) else jax.lax.stop_gradient(x)


def _same(x: Any, *_: Any) -> Any:
    return x


def _given(x: Any, value: Any, *_: Any) -> Any:
    return value


@own_derivative
def unseen(old: Any, new: Any) -> Any:
    """Return the new values of a write that derivatives do not see: they follow the old ones."""
    return new


@unseen.defjvp
def _unseen_jvp(primals: Any, tangents: Any) -> Any:
    return unseen(*primals), tangents[0]


SELECT_AT, SLICE_AT = "select at", "slice at"
"""These are ``select`` and ``slice`` whose first argument, an array, is the start."""

GETTERS: dict[Any, Get] = {
    SELECT_AT: _select_at,
    SLICE_AT: _slice_at,
    aten.alias.default: _same,
    aten.detach.default: lambda x: _detached(x),
    aten.view.default: _reshape,
    aten._reshape_alias.default: _reshape,
    aten.t.default: _t,
    aten.transpose.int: _swap,
    aten.permute.default: lambda x, dims: x.transpose(tuple(d % x.ndim for d in dims)),
    aten.expand.default: _expand,
    aten.squeeze.default: lambda x: x.reshape([s for s in x.shape if s != 1]),
    aten.squeeze.dim: lambda x, dim: x.squeeze(_squeeze_dims(x, [dim])),
    aten.squeeze.dims: lambda x, dims: x.squeeze(_squeeze_dims(x, dims)),
    aten.unsqueeze.default: _unsqueeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.unbind.int: _unbind,
    aten.diagonal.default: _diagonal,
    aten.unfold.default: _unfold,
    aten.as_strided.default: _as_strided,
    aten.view_as_real.default: _parts_of_complex,
    aten.view_as_complex.default: _complex_of_parts,
    aten.view.dtype: _bits,
    aten._conj.default: lambda x: jnp.conj(x),
    aten._neg_view.default: lambda x: -x,
}

# A setter takes (array before, new values, [index of the result,] arguments). Views without a
# setter are set through indices.
SETTERS: dict[Any, Get] = {
    SELECT_AT: _select_at_back,
    SLICE_AT: _slice_at_back,
    aten.alias.default: _given,
    aten.detach.default: unseen,
    aten.view.default: _reshape_back,
    aten._reshape_alias.default: _reshape_back,
    aten.t.default: lambda x, value: _t(value),
    aten.transpose.int: lambda x, value, a, b: _swap(value, a, b),
    aten.permute.default: _permute_back,
    aten.squeeze.default: _reshape_back,
    aten.squeeze.dim: _reshape_back,
    aten.squeeze.dims: _reshape_back,
    aten.unsqueeze.default: _reshape_back,
    aten.slice.Tensor: _slice_back,
    aten.select.int: _select_back,
    aten.split.Tensor: _split_back,
    aten.split_with_sizes.default: _split_with_sizes_back,
    aten.unbind.int: _unbind_back,
    aten.view_as_real.default: lambda x, value: _complex_of_parts(value),
    aten.view_as_complex.default: lambda x, value: _parts_of_complex(value),
    aten.view.dtype: _bits_back,
    aten._conj.default: lambda x, value: jnp.conj(value),
    aten._neg_view.default: lambda x, value: -value,
}


OTHER_VALUES = {aten._conj.default, aten._neg_view.default}
"""Views of the same elements that see other values than those in memory."""

OTHER_ELEMENTS = OTHER_VALUES | {
    aten.view.dtype,
    aten.view_as_real.default,
    aten.view_as_complex.default,
}
"""Views that see something other than a part of the elements in memory."""
