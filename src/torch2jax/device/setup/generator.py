"""``torch.Generator(device="jax")`` is PyTorch's generator for the CPU that says it is for jax.

PyTorch makes generators of other devices in C++ alone, where a device made in Python has no say.
Draws on device jax take JAX keys from whatever generator they are given; see ``random_streams``. So
a generator of the CPU has all that is needed: a seed, a state, and a sequence of its own.
"""

from __future__ import annotations

from typing import Any

import torch

from ..tensors.tensor import only_one

__all__ = ["Generator"]

_original: Any = torch._C.Generator


class _IsGenerator(type(_original)):
    """The metaclass says that every generator is an instance of ``torch.Generator``."""

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, _original)

    def __subclasscheck__(self, subclass: Any) -> bool:
        return issubclass(subclass, _original)

    def __call__(self, device: Any = "cpu") -> Any:
        device = torch.device(device)
        if device.type != "jax":
            return _original(device)
        only_one(device)
        return super().__call__()


class Generator(_original, metaclass=_IsGenerator):
    __doc__ = _original.__doc__
    __module__ = "torch"  # programs find it there

    @property
    def device(self) -> torch.device:
        return torch.device("jax", 0)

    def clone_state(self) -> Any:
        new = Generator("jax")
        new.set_state(self.get_state())
        return new

    def __reduce__(self) -> Any:
        return torch.Generator, ("jax",), self.get_state()

    def __setstate__(self, state: torch.Tensor) -> None:
        self.set_state(state)
