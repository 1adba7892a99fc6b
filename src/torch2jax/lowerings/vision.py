"""torchvision's operators are found by name, because importing torchvision makes them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .promotion import cast, wide
from .registry import lowering_by_name

__all__ = ["SHAPES_DEPEND_ON_VALUES"]

SHAPES_DEPEND_ON_VALUES = frozenset({"torchvision::nms"})
"""Operators whose results have such shapes, which torchvision does not tag."""


@lowering_by_name("torchvision::roi_align")
def _roi_align(
    input: Any,
    rois: Any,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Any:
    """Return the mean of samples, bilinear in the image, in each bin of a region.

    A sample at (y, x) is sum_YX hat(y - Y) hat(x - X) image[Y, X] with hat(t) = max(0, 1 - |t|). So
    a bin is A image Bᵀ, where a row of A adds up the samples' hats along y, and one of B along x.
    A region has no gradient, as in torchvision.
    """
    dtype = input.dtype
    image = cast(input, wide(dtype))
    regions = jax.lax.stop_gradient(cast(rois, image.dtype))
    n, channels, height, width = image.shape
    shift = 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (regions[:, i] * spatial_scale - shift for i in range(1, 5))
    rows, down = _samples(y1, y2, pooled_height, height, sampling_ratio, aligned)
    columns, across = _samples(x1, x2, pooled_width, width, sampling_ratio, aligned)
    count = jnp.maximum(down * across, 1)
    images = image.swapaxes(1, 2).reshape(n, height, channels * width)

    def pooled(region: Any) -> Any:
        index, row, column, n = region
        found = (row @ images[index]).reshape(-1, width) @ column.T
        return found.reshape(pooled_height, channels, pooled_width).swapaxes(0, 1) / n

    # Each region takes two plain products. Batched products are slower, and copy images.
    each = (regions[:, 0].astype(jnp.int32), rows, columns, count)
    return cast(jax.lax.map(pooled, each), dtype)


def _samples(
    start: Any, end: Any, bins: int, size: int, sampling_ratio: int, aligned: bool
) -> tuple[Any, Any]:
    """Return the sum of the hats of each bin's samples, [K, bins, size], and their number, [K]."""
    length = end - start if aligned else jnp.maximum(end - start, 1)
    each = length / bins
    n = jnp.full_like(each, sampling_ratio) if sampling_ratio > 0 else jnp.ceil(each)
    first = start[:, None] + jnp.arange(bins, dtype=start.dtype) * each[:, None]
    pixels = jnp.arange(size, dtype=start.dtype)

    def add(i: Any, total: Any) -> Any:
        at = first + ((i + 0.5) * each / n)[:, None]
        used = (at >= -1) & (at <= size) & (i < n)[:, None]
        hat = jnp.maximum(0, 1 - jnp.abs(jnp.clip(at, 0, size - 1)[..., None] - pixels))
        return total + jnp.where(used[..., None], hat, 0)

    most = sampling_ratio if sampling_ratio > 0 else jnp.max(n, initial=0).astype(jnp.int32)
    total = jnp.zeros((*first.shape, size), start.dtype)
    return jax.lax.fori_loop(0, most, add, total), n


@lowering_by_name("torchvision::_roi_align_backward")
def _roi_align_backward(
    grad: Any,
    rois: Any,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Any:
    def forward(image: Any) -> Any:
        return _roi_align(
            image, rois, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned
        )

    image = jnp.zeros((batch_size, channels, height, width), grad.dtype)
    return jax.vjp(forward, image)[1](grad)[0]
