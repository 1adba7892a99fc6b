"""These operators change the tensor itself: its memory, its size, its strides."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch

from ...._errors import Torch2JaxError
from ...tensors.tensor import Tensor, become, replace, take_memory, wrap
from .table import aten, special


@special(aten.set_.source_Tensor)
def _set_(args: Any, kwargs: Any) -> Any:
    if len(args) != 2 or type(args[1]) is not Tensor:
        raise Torch2JaxError("set_ on device jax takes a tensor on device jax, and no sizes.")
    return take_memory(args[0], args[1])


@special(aten.set_.default)
def _set_to_nothing(args: Any, kwargs: Any) -> Any:
    x = args[0]
    return become(x, wrap(jax.numpy.zeros((0,), x._cell.array.dtype), x.dtype))


@special(aten.is_set_to.default)
def _is_set_to(args: Any, kwargs: Any) -> Any:
    x, other = args
    return x._cell is other._cell and _place(x) == _place(other)


def _place(x: Tensor) -> Any:
    return x.shape, x.stride(), x.storage_offset()


@special(aten.resize_as_.default)
def _resize_as_(args: Any, kwargs: Any) -> Any:
    return _resize_((args[0], args[1].shape), {})


@special(aten.set_.source_Storage)
def refuse_storage(args: Any, kwargs: Any) -> Any:
    raise Torch2JaxError(
        "set_ on device jax takes a tensor on device jax: a JAX array has no storage to share."
    )


@special(aten.resize_.default)
def _resize_(args: Any, kwargs: Any) -> Any:
    x, size = args[0], tuple(args[1])
    if tuple(x.shape) == size:
        return x
    count = int(np.prod(size))
    flat = x.jax().reshape(-1)
    if count > flat.size:
        flat = jax.numpy.concatenate([flat, jax.numpy.zeros(count - flat.size, flat.dtype)])
    return become(x, wrap(flat[:count].reshape(size), x.dtype))


def _made_for_out(name: str, overload: str) -> None:
    """Make the values in the dtype of ``out=``, and random numbers with a key of their own."""
    packet = getattr(aten, name)
    plain = getattr(packet, overload.removesuffix("out").removesuffix("_") or "default")
    by_ends = name in ("linspace", "logspace")

    @special(getattr(packet, overload))
    def handler(args: Any, kwargs: Any) -> Any:
        out = kwargs["out"]
        rest = {k: v for k, v in kwargs.items() if k != "out"}
        new = plain(*args, **rest, dtype=out.dtype, device=torch.device("jax")).jax()
        if by_ends and new.size == out.numel():  # PyTorch fills what has as many elements
            new = new.reshape(out.shape)
        replace(out, new)
        return out


_BY_ENDS = ("out", "Tensor_Tensor_out", "Tensor_Scalar_out", "Scalar_Tensor_out")
for _name, _overloads in (
    ("rand", ("out", "generator_out")),
    ("randn", ("out", "generator_out")),
    ("randint", ("out", "generator_out", "low_out", "low_generator_out")),
    ("randperm", ("out", "generator_out")),
    ("normal", ("float_float_out",)),
    ("linspace", _BY_ENDS),
    ("logspace", _BY_ENDS),
):
    for _overload in _overloads:
        _made_for_out(_name, _overload)


def in_place_view(name: str) -> Any:
    def handler(args: Any, kwargs: Any) -> Any:
        view = getattr(aten, name)(args[0], *args[1:], **kwargs)
        return become(args[0], view)

    return handler
