"""The state of PyTorch in which a function is traced on device "jax"."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ..._bridge.torch_side import ambient
from ..._compat.torch import DeviceContext
from .. import random_streams
from ..thread_state import lowering_scope
from .autograd_functions import differentiable_by_jax


class _OnJax(DeviceContext):
    """``with torch.device("jax")``, for ``torch.normal(0.0, 1.0, size)`` too.

    PyTorch's default device leaves that one out: it would be drawn on the CPU, as a constant.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        random_streams.refuse_generators((*args, *kwargs.values()))  # on the CPU too
        if func is torch.normal and (len(args) > 2 or "size" in kwargs):
            kwargs = {"device": self.device, **kwargs}
        return super().__torch_function__(func, types, args, kwargs)


@contextlib.contextmanager
def running(default_dtype: torch.dtype, key: Any) -> Any:
    """The state in which ``fn`` is traced: device jax, JAX's derivatives, draws from the key."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(ambient.clean_surroundings(default_dtype))
        # fn may differentiate by itself (forces, torch.func), which needs PyTorch's graph.
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_OnJax(torch.device("jax")))
        stack.enter_context(random_streams.drawing_from(key, words=True))
        stack.enter_context(lowering_scope())
        stack.enter_context(differentiable_by_jax())
        yield
