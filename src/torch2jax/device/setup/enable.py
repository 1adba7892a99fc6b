"""``enable`` makes "jax" a PyTorch device, once, for the process.

Other tensors are computed as before. ``changes_of_pytorch`` lists what changes in PyTorch itself.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from ..._compat.torch import set_up_device
from ..._errors import Torch2JaxError
from ..operators.composites import register_composites
from ..tensors import methods
from .autocast import register_autocast
from .changes_of_pytorch import change_pytorch
from .device_module import DeviceModule
from .factories import register_factories
from .loading import register_loading

__all__ = ["enable", "is_enabled"]

_lock = threading.Lock()
_libraries: list[Any] = []
"""Registrations of kernels, which last as long as these objects. ``enable`` makes them."""


def is_enabled() -> bool:
    """Say whether "jax" is a PyTorch device in this process.

    >>> import torch2jax
    >>> torch2jax.device.enable()
    >>> torch2jax.device.is_enabled()
    True
    """
    return bool(_libraries)


def enable() -> None:
    """Make "jax" a PyTorch device for this process. Calling it again does nothing.

    Afterwards ``torch.randn(3, device="jax")``, ``.to("jax")``, ``with torch.device("jax"):`` and
    whatever else takes a device work, on the device that JAX computes on. Other tensors are
    computed as before: there is no mode. PyTorch gives all tensors and modules the methods of a
    named device, ``x.jax()``, ``x.is_jax`` and ``module.jax()``, and its own device "lazy" cannot
    be used in the same process.

    Raises:
        Torch2JaxError: another library has taken PyTorch's one place for a device of a library, or
            PyTorch is older than 2.10.

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
        set_up_device("jax", DeviceModule())
        libraries = [register_factories(), *register_autocast(), register_composites()]
        methods.install()
        change_pytorch()
        register_loading()
        _libraries.extend(libraries)
