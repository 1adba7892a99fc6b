"""With x64 off the greatest and the least int64 are those of int32, in which JAX carries int64.

Programs fill with them what a minimum or a maximum shall not find. They keep that meaning where
they are stored or compared, and nothing is computed with them. Any other number beyond int32 is an
error. Tensors that come from the CPU are treated alike (``from_torch``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["extremes_of"]

_GREATEST, _LEAST = 2**31 - 1, -(2**31)
_EXTREMES = {2**63 - 1: _GREATEST, 2**63: _GREATEST, -(2**63): _LEAST}
"""The second is what the greatest int64 is as a float: values of ``F.pad`` come as floats."""

_STORED = {
    *("full", "full_like", "new_full", "scalar_tensor", "fill", "masked_fill", "index_fill"),
    *("scatter", "constant_pad_nd", "eq", "ne", "lt", "le", "gt", "ge"),
}
_BOUNDS = {"clamp", "clamp_min", "clamp_max"}
"""No value is beyond int32, so any bound that is beyond bounds nothing."""


def extremes_of(
    op: Any, kwargs: dict[str, Any], dtypes: Sequence[torch.dtype | None]
) -> Callable[[Any], Any] | None:
    """Return what makes an argument fit for int32; None for operators that take it as it is."""
    namespace, _, name = op._schema.name.partition("::")
    if namespace not in ("aten", "prims") or name not in _STORED | _BOUNDS:
        return None
    default = torch.get_default_dtype() if name == "scalar_tensor" else None
    asked = kwargs.get("dtype") or default
    if any(d is not None and (d.is_floating_point or d.is_complex) for d in (asked, *dtypes)):
        return None
    return _bound if name in _BOUNDS else _stored


def _stored(x: Any) -> Any:
    return _EXTREMES.get(x, x) if type(x) in (int, float) else x


def _bound(x: Any) -> Any:
    return min(max(x, _LEAST), _GREATEST) if type(x) is int else x
