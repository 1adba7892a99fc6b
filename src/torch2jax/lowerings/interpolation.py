"""Bilinear resizing of arrays whose sizes may be symbolic dimensions of ``jax.export``.

PyTorch decomposes the operator for known sizes, so the table of lowerings does not have it. Output
i is at the position p(i) of the input, between the elements lo = floor(p) and hi = lo + 1:
y(i) = (1 - w) x(lo) + w x(hi), where w = p - lo. Rows and columns follow one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch

from .promotion import cast, wide

__all__ = ["DYNAMIC"]


def _resized(x: Any, axis: int, size: Any, align_corners: bool, scale: float | None) -> Any:
    n = x.shape[axis]
    i = jnp.arange(size, dtype=x.dtype)
    if align_corners:
        ratio = _number(n - 1, x.dtype) / jnp.maximum(_number(size - 1, x.dtype), 1)
        p = i * ratio
    else:
        ratio = 1 / scale if scale else _number(n, x.dtype) / _number(size, x.dtype)
        p = jnp.maximum((i + 0.5) * ratio - 0.5, 0)
    last = _number(n - 1, jnp.int32)
    lo = jnp.minimum(p.astype(jnp.int32), last)
    hi = jnp.minimum(lo + 1, last)
    shape = [1] * x.ndim
    shape[axis] = size
    w = jnp.clip(p - lo.astype(x.dtype), 0, 1).reshape(shape)
    return (1 - w) * jnp.take(x, lo, axis) + w * jnp.take(x, hi, axis)


def _number(n: Any, dtype: Any) -> Any:
    return jnp.asarray(n).astype(dtype)


def _bilinear(
    x: Any, size: Sequence[Any], align_corners: bool, scales: Sequence[float | None]
) -> Any:
    y = cast(x, wide(x.dtype))
    for axis, n, scale in zip((x.ndim - 2, x.ndim - 1), size, scales, strict=True):
        y = _resized(y, axis, n, align_corners, scale)
    return cast(y, x.dtype)


def upsample_bilinear2d(
    self: Any,
    output_size: Sequence[Any],
    align_corners: bool,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Any:
    return _bilinear(self, output_size, align_corners, (scales_h, scales_w))


def upsample_bilinear2d_vec(
    input: Any,
    output_size: Sequence[Any] | None,
    align_corners: bool,
    scale_factors: Sequence[float] | None = None,
) -> Any:
    if output_size is not None:
        return _bilinear(input, output_size, align_corners, (None, None))
    assert scale_factors is not None
    size = [_scaled(n, by) for n, by in zip(input.shape[-2:], scale_factors, strict=True)]
    return _bilinear(input, size, align_corners, scale_factors)


def _scaled(n: Any, by: float) -> Any:
    if isinstance(n, int):
        return math.floor(n * by)
    if by != int(by):
        raise NotImplementedError(f"a symbolic size {n} is resized by whole factors, not by {by}")
    return n * int(by)


DYNAMIC: dict[Any, Callable[..., jax.Array]] = {
    torch.ops.aten.upsample_bilinear2d.default: upsample_bilinear2d,
    torch.ops.aten.upsample_bilinear2d.vec: upsample_bilinear2d_vec,
}
