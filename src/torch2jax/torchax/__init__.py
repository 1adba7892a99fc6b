"""The names of torchax and torch_xla2 for programs written for them.

``import torch2jax.torchax as torchax``, or ``torch2jax.torchax.install()`` before an unchanged
``import torchax``. Only this module changes PyTorch's default device, from ``enable_globally`` or
``with default_env():`` until it is left.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import torch

from .. import device as _device
from ..device.checkpoints import load_checkpoint, save_checkpoint
from ..device.interop import extract as extract_jax
from . import amp, interop, tensor, train

__all__ = [
    "Environment",
    "amp",
    "compile",
    "default_env",
    "disable_globally",
    "disable_temporarily",
    "enable_globally",
    "extract_jax",
    "install",
    "interop",
    "load_checkpoint",
    "save_checkpoint",
    "tensor",
    "train",
]


class Environment:
    """In it jax is PyTorch's default device; made by ``default_env``."""

    def __init__(self) -> None:
        _device.enable()
        self._entered: list[Any] = []

    def __enter__(self) -> Environment:
        context = torch.device("jax")
        context.__enter__()
        self._entered.append(context)
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)

    def to_xla(self, tree: Any) -> Any:
        """Tensors of a pytree, or a module, on device jax; a module is moved in place."""
        if isinstance(tree, torch.nn.Module):
            return tree.to("jax")
        return jax.tree.map(
            lambda x: x.to("jax") if isinstance(x, torch.Tensor) else x,
            tree,
            is_leaf=lambda x: isinstance(x, torch.Tensor),
        )

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)


_environment: list[Environment] = []


def default_env() -> Environment:
    """The environment of the process."""
    if not _environment:
        _environment.append(Environment())
    return _environment[0]


def enable_globally() -> Environment:
    """Make jax PyTorch's default device, until ``disable_globally``."""
    env = default_env()
    torch.set_default_device("jax")
    return env


def disable_globally() -> None:
    """Make the CPU PyTorch's default device again."""
    torch.set_default_device(None)


@contextlib.contextmanager
def disable_temporarily() -> Iterator[None]:
    """The CPU is PyTorch's default device in this context."""
    with torch.device("cpu"):
        yield


def compile(fn: Any, options: Any = None) -> Any:
    """A module or function as a compiled one; see ``interop.JittableModule``."""
    if isinstance(fn, torch.nn.Module):
        return interop.JittableModule(fn, **(options or {}))
    return interop.jax_jit(fn)


def install() -> None:
    """Let ``import torchax`` and ``import torch_xla2`` find this module."""
    for name in ("torchax", "torch_xla2"):
        sys.modules[name] = sys.modules[__name__]
        for part in ("amp", "interop", "tensor", "train"):
            sys.modules[f"{name}.{part}"] = sys.modules[f"{__name__}.{part}"]
