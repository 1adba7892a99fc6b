"""These operators pool: they take maxima or means of windows."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .promotion import cast, default_int, is_inexact, per_dimension, wide
from .registry import lowering


def _extra(size: int, kernel: int, stride: int, pad: int, dilation: int, ceil_mode: bool) -> int:
    """Return how much more padding ``ceil_mode`` puts at the end."""
    reach = dilation * (kernel - 1) + 1
    spare = size + 2 * pad - reach
    out = (-(-spare // stride) if ceil_mode else spare // stride) + 1
    if ceil_mode and (out - 1) * stride >= size + pad:  # no window starts in the padding
        out -= 1
    return max((out - 1) * stride + reach - size - 2 * pad, 0)


# --- max pooling: the places of the maxima, and the values there ---------------------------------


def _windows(x: Any, n: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool):  # type: ignore[no-untyped-def]
    kernel = per_dimension(kernel, n)
    stride = per_dimension(stride, n) if stride else kernel
    padding, dilation = per_dimension(padding, n), per_dimension(dilation, n)
    sizes = x.shape[-n:]
    pads = [
        (p, p + _extra(s, k, st, p, d, ceil))
        for s, k, st, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True)
    ]
    return kernel, stride, pads, dilation


def _max_pool(x: Any, n: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool):  # type: ignore[no-untyped-def]
    kernel, stride, pads, dilation = _windows(x, n, kernel, stride, padding, dilation, ceil)
    sizes = x.shape[-n:]
    lead = x.shape[:-n]
    flat = x.reshape(math.prod(lead), *sizes)
    low = -jnp.inf if is_inexact(x) else jnp.iinfo(x.dtype).min
    low = jnp.asarray(low, x.dtype)
    places = jnp.arange(math.prod(sizes), dtype=np.int32).reshape(1, *sizes)
    dims = {
        "window_dimensions": (1, *kernel),
        "window_strides": (1, *stride),
        "padding": ((0, 0), *pads),
        "window_dilation": (1, *dilation),
    }

    def better(a: Any, b: Any) -> Any:
        # The first of equals wins, and a NaN wins over numbers.
        (av, ai), (bv, bi) = a, b
        nan_a = jnp.isnan(av) if is_inexact(x) else False
        nan_b = jnp.isnan(bv) if is_inexact(x) else False
        take = (bv > av) | ((bv == av) & (bi < ai))
        if is_inexact(x):
            take = (take & ~nan_a) | (nan_b & (~nan_a | (bi < ai)))
        return jnp.where(take, bv, av), jnp.where(take, bi, ai)

    start = (low, jnp.asarray(np.iinfo(np.int32).max, np.int32))
    operands = (lax.stop_gradient(flat), jnp.broadcast_to(places, flat.shape))
    _, where = lax.reduce_window(operands, start, better, **dims)
    out = where.shape[1:]
    rows = flat.reshape(flat.shape[0], math.prod(sizes))
    picked = jnp.take_along_axis(rows, where.reshape(flat.shape[0], math.prod(out)), 1, mode="clip")
    return picked.reshape(*lead, *out), where.reshape(*lead, *out).astype(default_int())


@lowering("max_pool2d_with_indices")
def max_pool2d_with_indices(
    self: Any, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Any:  # fmt: skip
    return _max_pool(self, 2, kernel_size, stride, padding, dilation, ceil_mode)


@lowering("max_pool3d_with_indices")
def max_pool3d_with_indices(
    self: Any, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Any:  # fmt: skip
    return _max_pool(self, 3, kernel_size, stride, padding, dilation, ceil_mode)


def _put_back(g: Any, self: Any, indices: Any, n: int) -> Any:
    lead, size = self.shape[:-n], math.prod(self.shape[-n:])
    rows = math.prod(lead)
    flat = jnp.zeros((rows, size), g.dtype)
    shape = rows, math.prod(indices.shape[-n:])
    flat = flat.at[jnp.arange(rows)[:, None], indices.reshape(shape)].add(g.reshape(shape))
    return flat.reshape(self.shape)


@lowering("max_pool2d_with_indices_backward")
def max_pool2d_with_indices_backward(
    grad_output: Any, self: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any,
    ceil_mode: bool, indices: Any,
) -> Any:  # fmt: skip
    return _put_back(grad_output, self, indices, 2)


@lowering("max_pool3d_with_indices_backward")
def max_pool3d_with_indices_backward(
    grad_output: Any, self: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any,
    ceil_mode: bool, indices: Any,
) -> Any:  # fmt: skip
    return _put_back(grad_output, self, indices, 3)


# --- average pooling -----------------------------------------------------------------------------


def _avg_pool(
    self: Any, n: int, kernel: Any, stride: Any, padding: Any, ceil: bool, include_pad: bool,
    divisor: Any,
) -> Any:  # fmt: skip
    kernel, stride, pads, _ = _windows(self, n, kernel, stride, padding, 1, ceil)
    x = cast(self, wide(self.dtype))
    sizes, lead = x.shape[-n:], x.shape[:-n]

    def add_up(v: Any, pads: Any) -> Any:
        return lax.reduce_window(
            v, np.zeros((), v.dtype)[()], lax.add, (1, *kernel), (1, *stride), ((0, 0), *pads)
        )

    total = add_up(x.reshape(math.prod(lead), *sizes), pads)
    if divisor is not None:
        count: Any = divisor
    else:
        # Padding counts where include_pad says so. What ceil_mode adds never counts.
        ones = jnp.ones((1, *sizes), x.dtype)
        if include_pad:
            given = per_dimension(padding, n)
            ones = jnp.pad(ones, [(0, 0), *((p, p) for p in given)], constant_values=1)
            pads = [(0, end - p) for (_, end), p in zip(pads, given, strict=True)]
        count = add_up(ones, pads)
    out = total / count
    return cast(out.reshape(*lead, *out.shape[1:]), self.dtype)


@lowering("avg_pool2d")
def avg_pool2d(
    self: Any, kernel_size: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Any:  # fmt: skip
    return _avg_pool(
        self, 2, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


@lowering("avg_pool3d")
def avg_pool3d(
    self: Any, kernel_size: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Any:  # fmt: skip
    return _avg_pool(
        self, 3, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


@lowering("avg_pool1d")
def avg_pool1d(
    self: Any, kernel_size: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Any:  # fmt: skip
    return _avg_pool(self, 1, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


@lowering("avg_pool2d_backward")
def avg_pool2d_backward(
    grad_output: Any, self: Any, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool,
    count_include_pad: bool, divisor_override: int | None,
) -> Any:  # fmt: skip
    rest = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return jax.linear_transpose(lambda x: avg_pool2d(x, *rest), self)(grad_output)[0]


@lowering("avg_pool3d_backward")
def avg_pool3d_backward(
    grad_output: Any, self: Any, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool,
    count_include_pad: bool, divisor_override: int | None,
) -> Any:  # fmt: skip
    rest = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return jax.linear_transpose(lambda x: avg_pool3d(x, *rest), self)(grad_output)[0]


def _adaptive(self: Any, output_size: Any, n: int) -> Any:
    """Each output is the mean of the inputs from floor(i s / o) to ceil((i + 1) s / o)."""
    x = cast(self, wide(self.dtype))
    for k, out in enumerate(per_dimension(output_size, n)):
        axis = x.ndim - n + k
        size = x.shape[axis]
        if out is None or out == size:
            continue
        if out and size % out == 0:
            shape = (*x.shape[:axis], out, size // out, *x.shape[axis + 1 :])
            x = jnp.mean(x.reshape(shape), axis + 1)
            continue
        weights = np.zeros((size, out), x.dtype)
        for i in range(out):
            start, end = i * size // out, -(-(i + 1) * size // out)
            weights[start:end, i] = 1 / (end - start)
        x = jnp.moveaxis(jnp.tensordot(x, jnp.asarray(weights), (axis, 0)), -1, axis)
    return cast(x, self.dtype)


@lowering("_adaptive_avg_pool2d", "adaptive_avg_pool2d")
def adaptive_avg_pool2d(self: Any, output_size: Any) -> Any:
    return _adaptive(self, output_size, 2)


@lowering("_adaptive_avg_pool3d", "adaptive_avg_pool3d")
def adaptive_avg_pool3d(self: Any, output_size: Any) -> Any:
    return _adaptive(self, output_size, 3)


@lowering("adaptive_avg_pool1d")
def adaptive_avg_pool1d(self: Any, output_size: Any) -> Any:
    return _adaptive(self, output_size, 1)


def _not_empty(grad: Any, n: int) -> tuple[int, ...]:
    """Return the sizes of the dimensions that are pooled, which PyTorch does not let be zero."""
    if not all(grad.shape[1:]):
        raise RuntimeError(
            "adaptive_avg_pool_backward(): Expected grad_output to have non-zero size for "
            f"non-batch dimensions, but grad_output has sizes {list(grad.shape)}"
        )
    return grad.shape[-n:]


@lowering("_adaptive_avg_pool2d_backward")
def adaptive_avg_pool2d_backward(grad_output: Any, self: Any) -> Any:
    size = _not_empty(grad_output, 2)
    return jax.linear_transpose(lambda x: _adaptive(x, size, 2), self)(grad_output)[0]


@lowering("_adaptive_avg_pool3d_backward")
def adaptive_avg_pool3d_backward(grad_output: Any, self: Any) -> Any:
    size = _not_empty(grad_output, 3)
    return jax.linear_transpose(lambda x: _adaptive(x, size, 3), self)(grad_output)[0]
