"""A function is traced on device "jax" in the state of PyTorch that is made here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..._bridge.torch_side import ambient
from ..._compat.torch import DeviceContext
from .. import random_streams
from ..thread_state import lowering_scope, state
from . import hooks as _hooks  # noqa: F401  the import registers our hooks
from . import layers as _layers  # noqa: F401
from .autograd_functions import differentiable_by_jax
from .detaching import watch_detach
from .needs_grad import NeedsGrad

__all__ = ["differentiated", "running"]


class _OnJax(DeviceContext):
    """The mode is ``with torch.device("jax")``, for ``torch.normal(0.0, 1.0, size)`` too.

    PyTorch's default device leaves that call out, which would draw a constant on the CPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        random_streams.refuse_generators((*args, *kwargs.values()))  # those of the CPU too
        if kwargs.get("out") is not None:  # it says by itself where the result is
            return func(*args, **kwargs)
        if func is torch.normal and (len(args) > 2 or "size" in kwargs):
            kwargs = {"device": self.device, **kwargs}
        return super().__torch_function__(func, types, args, kwargs)


@contextlib.contextmanager
def running(default_dtype: torch.dtype, key: Any, refuse_late: bool = False) -> Iterator[None]:
    """In this scope a function is traced: on device jax, with JAX's derivatives and this key.

    ``refuse_late`` is for a function that can be traced again; see ``NeedsGrad``.
    """

    @contextlib.contextmanager
    def surroundings() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(ambient.clean_surroundings(default_dtype))
            stack.enter_context(_OnJax(torch.device("jax")))
            yield

    with random_streams.drawing_from(key, words=True), differentiated(surroundings, refuse_late):
        yield


@contextlib.contextmanager
def differentiated(
    surroundings: Any = contextlib.nullcontext, refuse_late: bool = False
) -> Iterator[None]:
    """In this scope, within these surroundings, JAX differentiates what a function does.

    JAX runs a derivative that the user has written (an ``autograd.Function``, a hook) later, when
    the function has ended. ``state.resume`` makes the same state again.
    """
    watch_detach()
    stream = random_streams.current()

    @contextlib.contextmanager
    def resume() -> Iterator[None]:
        with random_streams.continuing(stream), _entered(surroundings, resume, False):
            yield

    with _entered(surroundings, resume, refuse_late):
        yield


@contextlib.contextmanager
def _entered(surroundings: Any, resume: Any, refuse_late: bool) -> Iterator[None]:
    # Gradients are on so that what fn differentiates itself (forces, torch.func) has its graph.
    with (
        surroundings(), NeedsGrad(refuse_late), torch.enable_grad(), lowering_scope(),
        differentiable_by_jax(),
    ):  # fmt: skip
        before, state.resume = state.resume, resume
        try:
            yield
        finally:
            state.resume = before
