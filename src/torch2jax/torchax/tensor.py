"""The tensor gets torchax's name and the methods that only torchax's programs call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from .._conversions.small import SHOWN, shown_dtype
from ..device.setup.enable import enable
from ..device.sharding import mark_sharding
from ..device.tensors.tensor import Tensor, become, concrete, read, to_torch, wrap, write
from .calls import call_jax
from .environment import Environment, default_env
from .modes import XLADispatchMode, XLAFunctionMode
from .ops.mappings import NUMPY_UNSUPPORTED_DTYPES, j2t, t2j
from .registry import OperatorNotFound

__all__ = [
    "Environment",
    "OperatorNotFound",
    "Tensor",
    "XLADispatchMode",
    "XLAFunctionMode",
    "j2t",
    "t2j",
]


def apply_jax(self: Tensor, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return ``fn(array, ...)`` as a tensor."""
    return call_jax(fn, self, *args, **kwargs)


def apply_jax_(self: Tensor, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Replace the tensor's values, shape, dtype and devices by those of ``fn(array, ...)``."""
    _replace(self, fn(self.jax(), *args, **kwargs), "apply_jax_")
    return self


def _replace(self: Tensor, new: Any, what: str) -> None:
    with torch.no_grad():
        if new.shape == self.shape and new.dtype == read(self).dtype:
            write(self, new)
            torch.autograd.graph.increment_version(self)
        elif self._chain is None:
            become(self, wrap(new, shown_dtype(new.dtype)))
        else:
            raise ValueError(
                f"{what} of a view must keep its shape and dtype, {tuple(self.shape)} "
                f"{self.dtype}; got {new.shape} {new.dtype}. apply_jax makes a new tensor."
            )


def _set_elem(self: Tensor, new: Any) -> None:
    """Replace the array, as ``x._elem = array`` says."""
    _replace(self, new.jax() if isinstance(new, Tensor) else jax.numpy.asarray(new), "_elem")


def shard_(self: Tensor, sharding: Any) -> Tensor:
    """Put the tensor's values on the devices of a ``jax.sharding.Sharding``."""
    return mark_sharding(self, sharding)


def _new(cls: Any, elem: Any, env: Any = None, requires_grad: bool = False) -> Tensor:
    """Make ``Tensor(array, env)`` a tensor of the array, without a copy."""
    x = wrap(elem, shown_dtype(elem.dtype))
    if requires_grad and (x.is_floating_point() or x.is_complex()):
        x.requires_grad_()
    return x


def _init(self: Any, *args: Any, **kwargs: Any) -> None:
    pass


enable()  # the device's own methods come first
_numpy = Tensor.numpy


def numpy(self: Tensor, *, force: bool = False) -> np.ndarray[Any, Any]:
    """Return the values. Dtypes that NumPy lacks, such as bfloat16, are those of ml_dtypes."""
    if self.dtype in NUMPY_UNSUPPORTED_DTYPES or read(self).dtype in SHOWN:
        return np.array(concrete(self.detach(), "numpy()"))  # type: ignore[arg-type]
    return _numpy(self, force=force)


for _name, _method in (
    ("__new__", staticmethod(_new)),
    ("__init__", _init),
    ("apply_jax", apply_jax),
    ("apply_jax_", apply_jax_),
    ("shard_", shard_),
    ("numpy", numpy),
    ("torch", lambda self: to_torch(self.detach(), "torch()")),
    ("jax_device", property(lambda self: read(self).device)),
    ("_elem", property(lambda self: self.jax(), _set_elem)),
    ("_env", property(lambda self: default_env())),
):
    setattr(Tensor, _name, _method)

# PyTorch gives tensors of all devices a method of a device's name, and programs ask by
# ``hasattr(x, "jax")`` whether a tensor is torchax's.
if "jax" in vars(torch.Tensor):
    del torch.Tensor.jax  # type: ignore[attr-defined]
