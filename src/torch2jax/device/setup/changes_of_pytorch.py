"""This file has everything that this package changes in PyTorch itself, and why.

PyTorch cannot let go of a device, and tensors of one may live as long as the process, so these
changes stay. ``change_pytorch`` makes them. Other tensors are computed as before.

- ``torch.Generator``: PyTorch makes generators of a device in C++ alone, so a subclass makes those
  of device jax. For all other devices it makes PyTorch's own.
- ``nn.Module._apply``: a parameter that two modules share would become two on its way to device
  jax. Modules that do not touch device jax are converted as before.
- ``GradScaler.unscale_``: it computes in float64, which JAX may have switched off. For tensors on
  device jax float32 takes its place.
- ``torch.utils.dlpack.to_dlpack`` and ``torch.to_dlpack``: PyTorch exports no tensor of a device
  that is made in Python. For tensors on device jax they give what ``x.__dlpack__()`` gives.
- Errors of backward passes: C++ names our tensors by its device "lazy", and users get "jax".
- The devices and types of ``foreach``: without ours in PyTorch's lists, optimizers and the clipping
  of gradients would take one parameter at a time.
- The name of the device (``set_up_device`` in the compat file): with it PyTorch gives all tensors
  ``x.jax()`` and ``x.is_jax``, and all modules ``module.jax()``. ``torch2jax.torchax`` takes
  ``x.jax`` away from tensors of other devices.
- The device "lazy": C++ knows our tensors by that name (NOTE [The wrapper's C++ device is lazy]),
  so PyTorch's own lazy tensors cannot be used in the same process.

These changes last while a function is traced, and are undone after it.

- ``forward`` of an ``autograd.Function``, as its class gives it, and the ``BackwardHook`` of
  modules: a derivative that the user has written must become one of JAX's. Other threads go past
  ours to PyTorch's.
- ``_detect_is_causal_mask`` of transformers and ``_BatchNorm.forward``: they ask a tensor for its
  value, which a trace does not have. For other tensors they do what PyTorch's do.
- Functions that ``torch.compile`` has made run uncompiled: it does not compile for device jax.
- ``torch.compiler.is_compiling()``: PyTorch's own checks would ask for values. PyTorch has one flag
  for all threads, so other threads see it too.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _foreach_utils, dlpack

from ..._compat.torch import foreach_types, uncompiled
from ..tensors.tensor import LAZY, Tensor
from ..thread_state import state
from .generator import Generator

__all__ = ["change_pytorch", "replace_while_tracing", "replacing"]


def change_pytorch() -> None:
    """Make the changes that stay."""
    torch.Generator = Generator
    _keep_ties()
    _scale_without_float64()
    _allow_foreach()
    _export_by_dlpack()
    _name_jax_in_errors()


# --- Module._apply -------------------------------------------------------------------------------


class _Moves(threading.local):
    """It has the new parameter of each old one while this thread converts a module."""

    def __init__(self) -> None:
        self.depth = 0
        self.made: dict[torch.Tensor, torch.nn.Parameter] = {}


_moves = _Moves()


def _keep_ties() -> None:
    """Let ``Module._apply`` keep a parameter one on its way to device jax or back.

    PyTorch moves a parameter by ``param.data = moved`` where both are of one kind, as for CUDA. To
    device jax each module makes a new parameter of its own, and a tied parameter would become two.
    Modules that do not touch device jax are converted as before.
    """
    convert: Callable[..., Any] = torch.nn.Module._apply

    @functools.wraps(convert)
    def apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> Any:
        before = dict(self._parameters)
        _moves.depth += 1  # a module converts its submodules by this method
        try:
            result = convert(self, fn, recurse)
            for name, old in before.items():
                new = self._parameters[name]
                if old is None or new is None or new is old:
                    continue
                if type(old) is Tensor or type(new) is Tensor:
                    self._parameters[name] = _moves.made.setdefault(old, new)
            return result
        finally:
            _moves.depth -= 1
            if not _moves.depth:
                _moves.made.clear()

    torch.nn.Module._apply = apply


# --- GradScaler ----------------------------------------------------------------------------------


def _scale_without_float64() -> None:
    """Let ``GradScaler`` compute the inverse of its scale in float32 where there is no float64.

    The scale is a power of two unless the user chose another, so float32 has its inverse exactly.
    """
    original = torch.amp.GradScaler.unscale_

    @functools.wraps(original)
    def unscale_(self: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        before, state.float64_is_float32 = state.float64_is_float32, True
        try:
            original(self, optimizer)
        finally:
            state.float64_is_float32 = before

    torch.amp.GradScaler.unscale_ = unscale_


# --- exports, and errors of backward passes ------------------------------------------------------


def _export_by_dlpack() -> None:
    original = dlpack.to_dlpack

    @functools.wraps(original)
    def to_dlpack(tensor: torch.Tensor) -> Any:
        return tensor.__dlpack__() if type(tensor) is Tensor else original(tensor)

    dlpack.to_dlpack = torch.to_dlpack = to_dlpack


_TYPE = re.compile(r"Lazy(\w+)Type")
_DEVICE = re.compile(r"\blazy\b")


def _name_jax_in_errors() -> None:
    """Let errors of ``backward()`` and ``torch.autograd.grad`` say jax, where C++ says lazy."""
    original: Any = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    @functools.wraps(original)
    def run_backward(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except RuntimeError as error:
            text = str(error)
            if type(error) is not RuntimeError or "azy" not in text:
                raise
            text = _TYPE.sub(r"torch.jax.\1Tensor", text)
            raise RuntimeError(_DEVICE.sub("jax", text)) from error

    torch.autograd._engine_run_backward = run_backward  # type: ignore[attr-defined]


# --- several tensors at a time -------------------------------------------------------------------


def _allow_foreach() -> None:
    """Let optimizers and the clipping of gradients take our tensors several at a time.

    PyTorch keeps a function that lists devices, and lists of the types of tensors.
    """
    devices = _foreach_utils._get_foreach_kernels_supported_devices
    _foreach_utils._get_foreach_kernels_supported_devices = lambda: [*devices(), LAZY.type]
    for types in foreach_types():
        if Tensor not in types:
            types.append(Tensor)


# --- while a function is traced ------------------------------------------------------------------

_lock = threading.Lock()
"""PyTorch's flag as it was before each trace under way."""
_traces = [0]
"""The number of traces under way on all threads."""

_ours: list[tuple[Any, str, Any]] = []
_theirs: list[tuple[Any, str, Any]] = []
_stance: list[Any] = []
_ABSENT = object()


def replace_while_tracing(owner: Any, name: str, ours: Any) -> None:
    """Let ``owner.name`` be ``ours`` during traces."""
    _ours.append((owner, name, ours))


@contextlib.contextmanager
def replacing() -> Iterator[None]:
    """In this scope a function is traced. The end of the last trace undoes the changes.

    PyTorch finds these functions by their names, in a class or a module. Ours ask whether a traced
    function calls them, since other threads meet them too.
    """
    with _lock:
        _traces[0] += 1
        if _traces[0] == 1:
            _stance.append(uncompiled())
            for owner, name, ours in _ours:
                _theirs.append((owner, name, vars(owner).get(name, _ABSENT)))
                setattr(owner, name, ours)
    try:
        yield
    finally:
        with _lock:
            _traces[0] -= 1
            if _traces[0] == 0:
                for owner, name, theirs in _theirs:
                    if theirs is _ABSENT:
                        delattr(owner, name)
                    else:
                        setattr(owner, name, theirs)
                _theirs.clear()
                restore = _stance.pop()
                restore()
