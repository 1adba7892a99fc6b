"""These operators are no functions of arrays: they move, assign to or change a tensor."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...._conversions.dtypes import x64_enabled
from ...._conversions.float64 import admit
from ...._conversions.small import PACKED
from ...._errors import Torch2JaxError
from ....lowerings.promotion import cast
from ...tensors.tensor import (
    Tensor,
    array_dtype,
    from_torch,
    only_one,
    stays,
    to_torch,
    wrap,
    write,
)
from ...thread_state import state
from .changes import in_place_view
from .indices import index_put
from .table import aten, ordinary_way, special


def _is_ours(device: Any) -> bool:
    return device is None or torch.device(device).type in ("jax", "lazy")


# --- to and from other devices -------------------------------------------------------------------


@special(aten._to_copy.default)
def _to_copy(args: Any, kwargs: Any) -> Any:
    x = args[0]
    dtype = kwargs.get("dtype") or x.dtype
    if state.float64_is_float32 and dtype is torch.float64 and not x64_enabled():
        dtype = torch.float32
    device = kwargs.get("device")
    if _is_ours(device):
        only_one(device)
    if type(x) is not Tensor:
        admit(dtype)
        return wrap(cast(from_torch(x), array_dtype(dtype)), dtype)
    if _is_ours(device) or stays(x, torch.device(device)):
        return _cast(x, dtype)
    if torch.device(device).type == "meta":
        return torch.empty(x.shape, dtype=dtype, device="meta")
    host = to_torch(x, f"to({device})")
    return host.to(device=device, dtype=host.dtype if dtype is PACKED else dtype)


@functools.cache
def _convert_element_type() -> Any:
    import torch._prims

    return torch.ops.prims.convert_element_type.default


def _cast(x: Tensor, dtype: torch.dtype) -> Any:
    array_dtype(dtype)
    return _convert_element_type()(x, dtype)


_copy_on_jax = ordinary_way(aten.copy_.default)


@special(aten.copy_.default)
def _copy_(args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    if type(target) is not Tensor:
        return target.copy_(to_torch(source, "copy_ into a CPU tensor"))
    if not isinstance(source, torch.Tensor):
        return aten.fill_.Scalar(target, source)
    if type(source) is not Tensor:
        if torch.nn.parameter.is_lazy(source):
            raise Torch2JaxError(
                "a parameter of a lazy module has no shape yet: call the module once where it is, "
                'and move it to "jax" after that.'
            )
        if source.device.type == "meta":
            raise RuntimeError("copy_ from a meta tensor, which has no values")
        same = source.shape == target.shape and target._chain is None
        source = source.detach().to(target.dtype)
        value = wrap(from_torch(source), source.dtype)
        if same and source.dtype == target.dtype:
            write(target, value._cell.array)
            return target
        source = value
    return _copy_on_jax((target, source), {})


@special(aten.lift_fresh.default, aten.lift.default)
def _lift(args: Any, kwargs: Any) -> Any:
    return args[0]


@special(getattr(aten._lazy_clone, "default", None))
def _lazy_clone(args: Any, kwargs: Any) -> Any:
    """Copy: arrays never change, so a copy costs nothing until a write."""
    return aten.clone.default(args[0])


for _op, _name in (
    (aten.t_.default, "t"),
    (aten.transpose_.default, "transpose"),
    (aten.squeeze_.default, "squeeze"),
    (aten.squeeze_.dim, "squeeze"),
    (aten.squeeze_.dims, "squeeze"),
    (aten.unsqueeze_.default, "unsqueeze"),
    (aten.as_strided_.default, "as_strided"),
):
    special(_op)(in_place_view(_name))


for _op in (
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
):
    special(_op)(index_put(_op))
