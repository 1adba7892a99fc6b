"""These operators join, repeat, pad and flip tensors, and copy views."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from .promotion import array_dtype, cast, dims_of, result_dtype
from .registry import lowering


@lowering("cat", "concat", "prims.cat")
def cat(tensors: Any, dim: int = 0) -> Any:
    dtype = result_dtype(*tensors)
    # PyTorch skips empty tensors of one dimension whatever the others' shapes are.
    kept = [x for x in tensors if x.shape != (0,)] or list(tensors)
    return jnp.concatenate([cast(x, dtype) for x in kept], axis=dim)


@lowering("stack")
def stack(tensors: Any, dim: int = 0) -> Any:
    dtype = result_dtype(*tensors)
    return jnp.stack([cast(x, dtype) for x in tensors], axis=dim)


@lowering("flip", "prims.rev")
def flip(self: Any, dims: Any) -> Any:
    return jnp.flip(self, dims_of(self, dims)) if dims and self.ndim else self


@lowering("roll", scalars=("shifts",))
def roll(self: Any, shifts: Any, dims: Any = ()) -> Any:
    shifts = list(shifts) if isinstance(shifts, list | tuple) else [shifts]
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not self.size:
        return self
    return jnp.roll(self, shifts, dims) if dims else jnp.roll(self, shifts[0])


@lowering("repeat")
def repeat(self: Any, repeats: Any) -> Any:
    return jnp.tile(self, repeats) if repeats else self


@lowering("repeat_interleave.self_int")
def repeat_interleave(
    self: Any, repeats: int, dim: int | None = None, *, output_size: Any = None
) -> Any:
    return jnp.repeat(self, repeats, axis=dim)


@lowering("constant_pad_nd")
def constant_pad_nd(self: Any, pad: Any, value: Any = 0) -> Any:
    widths = _widths(self.ndim, pad)
    return lax.pad(self, cast(value, self.dtype), [(a, b, 0) for a, b in widths])


def _widths(ndim: int, pad: Any) -> list[tuple[int, int]]:
    """Return the padding by dimension. PyTorch lists that of the last dimension first."""
    pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]
    return [(0, 0)] * (ndim - len(pairs)) + pairs[::-1]


def _padded(mode: str) -> Any:
    def fn(self: Any, padding: Any) -> Any:
        widths = _widths(self.ndim, padding)
        # A negative width cuts elements off after the other side is padded.
        padded = jnp.pad(self, [(max(a, 0), max(b, 0)) for a, b in widths], mode=mode)
        sizes = zip(padded.shape, widths, strict=True)
        return padded[tuple(slice(max(-a, 0), n - max(-b, 0)) for n, (a, b) in sizes)]

    return fn


for _d in "123":
    lowering(f"reflection_pad{_d}d")(_padded("reflect"))
    lowering(f"replication_pad{_d}d")(_padded("edge"))


@lowering("tril")
def tril(self: Any, diagonal: int = 0) -> Any:
    return jnp.tril(self, diagonal)


@lowering("triu")
def triu(self: Any, diagonal: int = 0) -> Any:
    return jnp.triu(self, diagonal)


@lowering("diag_embed")
def diag_embed(self: Any, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    n = self.shape[-1] + abs(offset)
    rows = np.arange(self.shape[-1]) + max(-offset, 0)
    columns = np.arange(self.shape[-1]) + max(offset, 0)
    out = jnp.zeros((*self.shape[:-1], n, n), self.dtype).at[..., rows, columns].set(self)
    return jnp.moveaxis(out, (-2, -1), (dim1, dim2))


@lowering("_unsafe_view", "view_copy", "prims.reshape")
def unsafe_view(self: Any, size: Any) -> Any:
    from .views import resolved

    return self.reshape(resolved(size, self.size))


@lowering("prims.broadcast_in_dim")
def broadcast_in_dim(a: Any, shape: Any, broadcast_dimensions: Any) -> Any:
    return lax.broadcast_in_dim(a, tuple(shape), tuple(broadcast_dimensions))


@lowering("prims.squeeze")
def prims_squeeze(a: Any, dimensions: Any) -> Any:
    return jnp.squeeze(a, tuple(dimensions))


@lowering("prims.transpose")
def prims_transpose(a: Any, permutation: Any) -> Any:
    return jnp.transpose(a, tuple(permutation))


@lowering("prims.collapse_view", "prims.collapse")
def collapse(a: Any, start: int, end: int) -> Any:
    n = int(np.prod(a.shape[start : end + 1]))
    return a.reshape((*a.shape[:start], n, *a.shape[end + 1 :]))


@lowering("prims.split_dim")
def split_dim(a: Any, dim: int, outer_length: int) -> Any:
    inner = a.shape[dim] // outer_length
    return a.reshape((*a.shape[:dim], outer_length, inner, *a.shape[dim + 1 :]))


@lowering("prims.view_of")
def view_of(a: Any) -> Any:
    return a


@lowering("unfold_backward")
def unfold_backward(grad_in: Any, input_sizes: Any, dim: int, size: int, step: int) -> Any:
    from .views import GETTERS

    places = GETTERS[torch.ops.aten.unfold.default](
        np.arange(int(np.prod(input_sizes))).reshape(input_sizes), dim, size, step
    )
    flat = jnp.zeros((int(np.prod(input_sizes)),), grad_in.dtype)
    return flat.at[places].add(grad_in).reshape(input_sizes)


# In eager mode an index comes as an array, so that a loop over it compiles one program.


def _part_set(x: Any, part: Any, dim: int, start: Any, step: int) -> Any:
    """Return ``x`` with the elements of a slice replaced; PyTorch's default start is None."""
    from .views import SETTERS, SLICE_AT

    dim = dim % x.ndim
    n, count = x.shape[dim], part.shape[dim]
    if not count:
        return x
    if hasattr(start, "dtype"):
        start = jnp.clip(jnp.where(start < 0, start + n, start), 0, n)
    else:
        start = slice(start, None).indices(n)[0]
    return SETTERS[SLICE_AT](x, part, start, dim, count, step)


def _row_set(x: Any, row: Any, dim: int, index: Any) -> Any:
    from .views import SELECT_AT, SETTERS

    return SETTERS[SELECT_AT](x, row, index, dim)


@lowering("slice_backward", scalars=("start", "end"))
def slice_backward(
    grad_output: Any, input_sizes: Any, dim: int, start: Any, end: Any, step: int
) -> Any:
    return _part_set(jnp.zeros(input_sizes, grad_output.dtype), grad_output, dim, start, step)


@lowering("select_backward", scalars=("index",))
def select_backward(grad_output: Any, input_sizes: Any, dim: int, index: Any) -> Any:
    return _row_set(jnp.zeros(input_sizes, grad_output.dtype), grad_output, dim, index)


@lowering("slice_scatter", scalars=("start", "end"))
def slice_scatter(
    self: Any, src: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    return _part_set(self, cast(src, self.dtype), dim, start, step)


@lowering("select_scatter", scalars=("index",))
def select_scatter(self: Any, src: Any, dim: int, index: Any) -> Any:
    return _row_set(self, cast(src, self.dtype), dim, index)


@lowering("as_strided_scatter")
def as_strided_scatter(
    self: Any, src: Any, size: Any, stride: Any, storage_offset: int | None = None
) -> Any:
    from .views import GETTERS, scatter

    seen = GETTERS[torch.ops.aten.as_strided.default]
    return scatter(lambda x: seen(x, size, stride, storage_offset), self, cast(src, self.dtype))


@lowering("tril_indices")
def tril_indices(row: int, col: int, offset: int = 0, *, dtype: Any = torch.int64) -> Any:
    return jnp.stack(
        [jnp.asarray(x, array_dtype(dtype)) for x in np.tril_indices(row, offset, col)]
    )


@lowering("triu_indices")
def triu_indices(row: int, col: int, offset: int = 0, *, dtype: Any = torch.int64) -> Any:
    return jnp.stack(
        [jnp.asarray(x, array_dtype(dtype)) for x in np.triu_indices(row, offset, col)]
    )
