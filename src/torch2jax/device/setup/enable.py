"""Makes "jax" a PyTorch device: once, for the process, with no change for other tensors."""

from __future__ import annotations

import threading
from typing import Any

import torch

from ..._compat.torch import allow_foreach, foreach_types, set_up_device
from ..._errors import Torch2JaxError
from ..operators.composites import register_composites
from ..tensors import methods
from ..tensors.tensor import Tensor
from . import generator, modules
from .autocast import register_autocast, scale_gradients
from .device_module import _Module
from .factories import register_factories
from .loading import register_loading

__all__ = ["enable", "is_enabled"]

_lock = threading.Lock()
_libraries: list[Any] = []


def is_enabled() -> bool:
    """Whether "jax" is a PyTorch device in this process.

    >>> import torch2jax
    >>> torch2jax.device.enable()
    >>> torch2jax.device.is_enabled()
    True
    """
    return bool(_libraries)


def enable() -> None:
    """Make "jax" a PyTorch device, for this process. Calling it again does nothing.

    Afterwards ``torch.randn(3, device="jax")``, ``.to("jax")``, ``with torch.device("jax"):`` and
    whatever else takes a device work, on the device that JAX computes on. Other tensors are as
    before: there is no mode.

    Raises:
        Torch2JaxError: another library has taken PyTorch's one place for a device of a library;
            or PyTorch is older than 2.10.

    >>> import torch, torch2jax
    >>> torch2jax.device.enable()
    >>> x = torch.ones(2, device="jax")
    >>> x + 1
    tensor([2., 2.], device='jax:0')
    """
    with _lock:
        if _libraries:
            return
        taken = torch._C._get_privateuse1_backend_name()
        if taken not in ("privateuseone", "jax"):
            raise Torch2JaxError(
                f"PyTorch has place for one device from outside, and {taken!r} has taken it."
            )
        set_up_device("jax", _Module())
        _libraries.append(register_factories())
        _libraries.append(register_autocast())
        _libraries.append(register_composites())
        methods.install()
        modules.keep_ties()
        generator.install()
        scale_gradients()
        register_loading()
        allow_foreach("lazy")  # as which C++ knows the device
        # Optimizers take their multi-tensor form for these types of parameters only.
        for types in foreach_types():
            if Tensor not in types:
                types.append(Tensor)
