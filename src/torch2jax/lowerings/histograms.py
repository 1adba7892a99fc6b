"""Histograms have bins of one width."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from .promotion import cast, category
from .registry import lowering


@lowering("histc")
def histc(self: Any, bins: int = 100, min: Any = 0, max: Any = 0) -> Any:
    """Count the elements in each bin between ``min`` and ``max``, in the dtype of ``self``.

    Equal ends stand for the least and the greatest element. Integers are counted as PyTorch's
    kernels for accelerators do. The one for the CPU refuses them.
    """
    if category(self.dtype) not in (1, 2):
        raise NotImplementedError(f"torch.histc of {self.dtype}")
    if bins <= 0:
        raise RuntimeError(f"torch.histc: bins must be > 0, but got {bins}")
    if max < min:
        raise RuntimeError("torch.histc: max must be larger than min")
    if not self.size:
        return jnp.zeros(bins, self.dtype)
    x = lax.stop_gradient(self.ravel())
    whole = category(x.dtype) == 1
    if whole and x.dtype.itemsize < 4:  # its dtype may not hold the ends of the bins
        x = cast(x, np.int32)
    low, high = (jnp.asarray(int(end) if whole else end, x.dtype) for end in (min, max))
    if min == max:
        low, high = x.min(), x.max()
        low, high = jnp.where(low == high, low - 1, low), jnp.where(low == high, high + 1, high)
    inside = (low <= x) & (x <= high)
    place = (_bins_of_integers if whole else _bins_of_floats)(x, low, high, bins)
    place = jnp.where(inside, jnp.clip(place, 0, bins - 1), bins)
    return cast(jnp.zeros(bins, np.int32).at[place].add(1, mode="drop"), self.dtype)


def _bins_of_floats(x: Any, low: Any, high: Any, bins: int) -> Any:
    # The order of these operations, and their rounding, decide about elements between two bins.
    place = (x - low) * bins / (high - low)
    return jnp.where(jnp.isfinite(place), place, 0).astype(np.int32)


def _bins_of_integers(x: Any, low: Any, high: Any, bins: int) -> Any:
    """The bin is floor(q n / r) for q = x - low, r = high - low and n bins.

    It is at least b where q >= ceil(b r / n) = b (r // n) + ceil(b (r mod n) / n). No product in
    that is greater than r or n^2, and unsigned differences do not overflow.
    """
    unsigned = np.dtype(f"uint{8 * x.dtype.itemsize}")
    q, r = x.astype(unsigned) - low.astype(unsigned), high.astype(unsigned) - low.astype(unsigned)
    b, n = jnp.arange(bins, dtype=unsigned), unsigned.type(bins)
    edges = b * (r // n) + (b * (r % n) + (n - 1)) // n
    return jnp.searchsorted(edges, q, side="right") - 1
