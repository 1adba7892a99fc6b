"""An index may be a mask, whose values decide the shape of the result."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np
import torch
from jax.core import Tracer

from ...._compat.jax import trace_state_clean
from ...._conversions.float64 import is_carried, narrow_number
from ....lowerings.registry import TABLE, DataDependentShape
from ...tensors.tensor import Tensor, asked, known, wrap
from ...thread_state import other_devices_allowed
from ..operands import from_other_device
from .table import aten, ordinary_way, special

_BYTES = "indexing with dtype torch.uint8 is now deprecated, please use a dtype torch.bool instead."


def _without_masks(x: Tensor, indices: Any, what: str) -> list[Any]:
    """Return the indices, with each mask replaced by the places at which it is true."""
    found: list[Any] = []
    at = 0
    for index in indices:
        if index is None:
            found.append(None)
            at += 1
            continue
        index = from_other_device(index) if type(index) is not Tensor else index
        if index.dtype in (torch.bool, torch.uint8):
            if index.dtype is torch.uint8:
                warnings.warn(_BYTES, UserWarning, stacklevel=2)
            _refuse_mask(x, index, at)
            at += index.ndim
            mask = asked(index)
            if mask is None:
                raise DataDependentShape(what)
            places = np.nonzero(np.asarray(mask))
            found += [wrap(jax.numpy.asarray(p, np.int32), torch.int64) for p in places]
        else:
            found.append(index)
            at += 1
    return found


def _refuse_mask(x: Any, mask: Any, at: int) -> None:
    """Raise PyTorch's error where a mask is not as large as the dimensions that it stands for."""
    for i, size in enumerate(mask.shape):
        if at + i >= x.ndim or x.shape[at + i] != size:
            raise IndexError(
                f"The shape of the mask {list(mask.shape)} at index {i} does not match the shape "
                f"of the indexed tensor {list(x.shape)} at index {at + i}"
            )


def _has_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


_scalar_tensor = ordinary_way(aten.scalar_tensor.default)


@special(aten.scalar_tensor.default)
def _number(args: Any, kwargs: Any) -> Any:
    """Make the tensor of the value in ``x[i] = 1.5``. Another value needs no other program."""
    dtype = kwargs.get("dtype")
    beyond = type(args[0]) is int and not -(2**31) <= args[0] < 2**31
    if dtype is None or beyond or not trace_state_clean():
        return _scalar_tensor(args, kwargs)
    value = args[0]
    if type(value) is float and is_carried(dtype):
        value = narrow_number(value)
    return wrap(TABLE[aten.scalar_tensor.default].fn(value, **kwargs), dtype)


_index = ordinary_way(aten.index.Tensor)


@special(aten.index.Tensor)
def _index_tensor(args: Any, kwargs: Any) -> Any:
    x, indices = _beside(args[0]), args[1]
    if _has_mask(indices):
        indices = _without_masks(x, indices, "an index that is a mask")
    return _index((x, [i if i is None else _beside(i) for i in indices]), kwargs)


def _beside(x: Any) -> Any:
    """Take an index, which may be on the CPU, as it may beside CUDA tensors."""
    if type(x) is Tensor:
        return x
    with other_devices_allowed():
        return from_other_device(x)


def index_put(func: Any) -> Any:
    plain = ordinary_way(func)

    def handler(args: Any, kwargs: Any) -> Any:
        x, indices, values, *rest = args
        accumulate = kwargs.get("accumulate", rest[0] if rest else False)
        if _has_mask(indices):
            only = [i for i in indices if i is not None]
            whole = len(only) == 1 and indices[0] is not None and only[0].dtype is torch.bool
            if whole and not accumulate and values.numel() == 1:
                return _masked(func, x, _beside(only[0]), values)
            if whole and isinstance(known(_beside(only[0])), Tracer):
                return _masked_rows(func, x, _beside(only[0]), values, accumulate)
            indices = _without_masks(x, indices, "an index that is a mask")
        indices = [i if i is None else _beside(i) for i in indices]
        return plain((x, indices, values, *rest), kwargs)

    return handler


def _masked_scatter(func: Any) -> None:
    plain = ordinary_way(func)

    @special(func)
    def handler(args: Any, kwargs: Any) -> Any:
        x, mask, source = args
        if type(mask) is Tensor and source.numel() < mask.numel():
            there = known(mask)
            if not isinstance(there, Tracer):
                mask_of_all = np.broadcast_to(
                    np.asarray(there), np.broadcast_shapes(x.shape, mask.shape)
                )
                if np.count_nonzero(mask_of_all) > source.numel():
                    raise RuntimeError("Number of elements of source < number of ones in mask")
        return plain(args, kwargs)


_masked_scatter(aten.masked_scatter.default)
_masked_scatter(aten.masked_scatter_.default)


def _masked(func: Any, x: Any, mask: Any, values: Any) -> Any:
    """Compute ``x[mask] = number``, which needs no places, so it works on tracers as well."""
    _refuse_mask(x, mask, 0)
    mask = mask.view(*mask.shape, *[1] * (x.ndim - mask.ndim))
    number = values.reshape(()).to(x.dtype)
    if func._schema.is_mutable:
        return aten.masked_fill_.Tensor(x, mask, number)
    return aten.masked_fill.Tensor(x, mask, number)


def _masked_rows(func: Any, x: Any, mask: Any, values: Any, accumulate: bool) -> Any:
    """Compute ``x[mask] = values``: the k-th true place takes row k, or all take the only row."""
    _refuse_mask(x, mask, 0)
    places = aten.cumsum.default(mask.reshape(-1), 0) - 1
    row = x.shape[mask.ndim :]
    rows = values.expand(-1 if values.ndim > len(row) else 1, *row)
    taken = aten.index_select.default(rows, 0, places.clamp(0, rows.shape[0] - 1))
    taken = taken.reshape(x.shape)
    new = aten.where.self(
        mask.view(*mask.shape, *[1] * len(row)), x + taken if accumulate else taken, x
    )
    return aten.copy_.default(x, new) if func._schema.is_mutable else new
