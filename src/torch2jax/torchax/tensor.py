"""The tensor gets torchax's name and the methods that only torchax's programs call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..device.interop import tensor as _tensor
from ..device.sharding import mark_sharding
from ..device.tensors.tensor import Tensor, become, read, to_torch, write
from .calls import call_jax
from .environment import Environment

__all__ = ["Environment", "Tensor"]


def apply_jax(self: Tensor, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return ``fn(array, ...)`` as a tensor."""
    return call_jax(fn, self, *args, **kwargs)


def apply_jax_(self: Tensor, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Replace the tensor's values, shape, dtype and devices by those of ``fn(array, ...)``."""
    with torch.no_grad():
        new = fn(self.jax(), *args, **kwargs)
        if new.shape == self.shape and new.dtype == read(self).dtype:
            write(self, new)
            torch.autograd.graph.increment_version(self)
        elif self._chain is None:
            become(self, _tensor(new))
        else:
            raise ValueError(
                f"apply_jax_ of a view must keep its shape and dtype, {tuple(self.shape)} "
                f"{self.dtype}; got {new.shape} {new.dtype}. apply_jax makes a new tensor."
            )
    return self


def shard_(self: Tensor, sharding: Any) -> Tensor:
    """Put the tensor's values on the devices of a ``jax.sharding.Sharding``."""
    return mark_sharding(self, sharding)


def _new(cls: Any, elem: Any, env: Any = None, requires_grad: bool = False) -> Tensor:
    """Make ``Tensor(array, env)`` a tensor of the array, without a copy."""
    return _tensor(elem, requires_grad)


def _init(self: Any, *args: Any, **kwargs: Any) -> None:
    pass


for _name, _method in (
    ("__new__", staticmethod(_new)),
    ("__init__", _init),
    ("apply_jax", apply_jax),
    ("apply_jax_", apply_jax_),
    ("shard_", shard_),
    ("torch", lambda self: to_torch(self.detach(), "torch()")),
    ("jax_device", property(lambda self: read(self).device)),
):
    setattr(Tensor, _name, _method)
