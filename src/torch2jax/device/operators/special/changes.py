"""These operators change the tensor itself: its memory, its size, its strides."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ...._errors import Torch2JaxError
from ...tensors.tensor import Tensor, become, wrap
from .table import aten, special


@special(aten.set_.source_Tensor)
def _set_(args: Any, kwargs: Any) -> Any:
    if len(args) != 2 or type(args[1]) is not Tensor:
        raise Torch2JaxError("set_ on device jax takes a tensor on device jax, and no sizes.")
    return become(args[0], args[1])


@special(aten.set_.source_Storage, aten.set_.default)
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


def in_place_view(name: str) -> Any:
    def handler(args: Any, kwargs: Any) -> Any:
        view = getattr(aten, name)(args[0], *args[1:], **kwargs)
        return become(args[0], view)

    return handler
