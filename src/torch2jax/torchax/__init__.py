"""Programs written for torchax and torch_xla2 find their names here.

A program says ``import torch2jax.torchax as torchax``, or it calls ``torch2jax.torchax.install()``
before an unchanged ``import torchax``. Importing this module enables the device "jax". As in
torchax, PyTorch's default device stays the CPU, ``x.jax`` exists for tensors on device jax alone,
and ``x.numpy()`` has the dtypes of ml_dtypes where NumPy has none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import torch

from .. import device as _device
from . import (
    amp,
    checkpoint,
    config,
    flax,
    interop,
    mesh_util,
    ops,
    tensor,
    train,
    types,
    util,
    view,
)
from .checkpoint import load_checkpoint, save_checkpoint
from .environment import Environment, default_env

if TYPE_CHECKING:
    from . import export

__all__ = [
    "VERSION",
    "CompileOptions",
    "Environment",
    "__version__",
    "amp",
    "checkpoint",
    "compile",
    "config",
    "default_env",
    "disable_globally",
    "disable_temporarily",
    "enable_accuracy_mode",
    "enable_globally",
    "enable_performance_mode",
    "export",
    "extract_jax",
    "flax",
    "install",
    "interop",
    "load_checkpoint",
    "mesh_util",
    "ops",
    "save_checkpoint",
    "tensor",
    "train",
    "types",
    "util",
    "view",
]

__version__ = "0.0.14"
"""The release of torchax that is followed."""
VERSION = __version__


def enable_globally() -> Environment:
    """Enter the default environment on this thread, until ``disable_globally``."""
    env = default_env()
    env.enable_torch_modes()
    return env


def disable_globally() -> None:
    """Leave the default environment again."""
    default_env().disable_torch_modes()


@contextlib.contextmanager
def disable_temporarily() -> Iterator[None]:
    """Leave the default environment in this context."""
    env = default_env()
    depth = env.leave()
    try:
        yield
    finally:
        for _ in range(depth):
            env.enable_torch_modes()


def enable_accuracy_mode() -> None:
    """Let JAX use 64-bit types and exact matrix products, in the whole process."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")


def enable_performance_mode() -> None:
    """Let JAX use no 64-bit types and fast matrix products, in the whole process."""
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_default_matmul_precision", "default")


def extract_jax(
    mod: torch.nn.Module, env: Any = None, dedup_parameters: bool = True, tie_weights: bool = True
) -> tuple[Any, Any]:
    """Return ``(arrays by name, fn(arrays, args, kwargs=None))``; see ``device.extract``.

    Tied parameters are one array, which has their first name.
    """
    return _device.extract(mod)


@dataclasses.dataclass
class CompileOptions:
    """``compile`` compiles these methods of a module, with these options of ``jax.jit``."""

    methods_to_compile: list[str] = dataclasses.field(default_factory=lambda: ["forward"])
    jax_jit_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    mode: str = "jax"


def compile(fn: Any, options: CompileOptions | None = None) -> Any:
    """Compile a module to an ``interop.JittableModule``, or a function by ``interop.jax_jit``."""
    options = options or CompileOptions()
    if options.mode != "jax":
        raise ValueError(
            f'compile has mode "jax", not {options.mode!r}: torch.compile(model, '
            'backend="torch2jax") goes through dynamo, torch2jax.device.export exports.'
        )
    if not isinstance(fn, torch.nn.Module):
        return interop.jax_jit(fn, options.jax_jit_kwargs)
    module = interop.JittableModule(fn, extra_jit_args=options.jax_jit_kwargs)
    for name in options.methods_to_compile:
        module.make_jitted(name)
    return module


_device.enable()

_PARTS = (
    *("amp", "checkpoint", "config", "export", "flax", "interop", "mesh_util", "ops"),
    *("ops.jaten", "ops.jc10d", "ops.jlibrary", "ops.jtorch", "ops.mappings", "ops.ops_registry"),
    *("tensor", "train", "types", "util", "view"),
)


_OURS = (__name__, tensor.Tensor.__module__)


def __getattr__(name: str) -> Any:
    if name == "export":  # torch.export and jax.export take a second to import
        return importlib.import_module(".export", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def install() -> None:
    """Let ``import torchax`` and ``import torch_xla2`` find this module.

    Public classes say that they are torchax's, ``type(x).__module__ == "torchax.tensor"``, because
    programs ask by that whether a tensor is on device jax.
    """
    for part in _PARTS:
        importlib.import_module(f".{part}", __name__)
    for name in ("torchax", "torch_xla2"):
        sys.modules[name] = sys.modules[__name__]
        for part in _PARTS:
            sys.modules[f"{name}.{part}"] = sys.modules[f"{__name__}.{part}"]
    for part in _PARTS:
        module = sys.modules[f"{__name__}.{part}"]
        for value in (getattr(module, name) for name in module.__all__):
            if isinstance(value, type) and value.__module__.startswith(_OURS):
                value.__module__ = f"torchax.{part}"
