"""The user's ``detach`` ends JAX's derivative, and PyTorch's own ``detach`` does not.

NOTE [Detached by the user]. PyTorch's autograd detaches every result that it saves for a backward
pass, directly by ``__torch_dispatch__``. A derivative that is taken inside a traced function is
made of what was saved, so JAX's derivative of it has to go on there. What the user detaches
(``detach``, ``detach_``, ``.data``) comes through the dispatcher, where kernels for autograd's key
note it. They are registered when a function is first traced for JAX's derivative, because they cost
each ``detach`` 4 µs. What is computed while gradients are off ends JAX's derivative as well.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from ..._compat.torch import AFTER_AUTOGRAD, ANY_AUTOGRAD
from ..operators.view_operator import stopped
from ..thread_state import state

__all__ = ["watch_detach"]

aten = torch.ops.aten

_lock = threading.Lock()
_libraries: list[Any] = []


def watch_detach() -> None:
    """Tell the user's ``detach`` from PyTorch's own from now on."""
    with _lock:
        if _libraries:
            return
        library = torch.library.Library("aten", "IMPL")
        for key in ("AutogradLazy", "AutogradPrivateUse1"):
            library.impl("detach", _detach, key, with_keyset=True)
            library.impl("detach_", _detach_, key)
        _libraries.append(library)


def _detach(keys: Any, x: Any) -> Any:
    state.detaching += 1
    try:
        return aten.detach.default.redispatch(keys & AFTER_AUTOGRAD, x)
    finally:
        state.detaching -= 1


def _detach_(x: Any) -> Any:
    out = aten.detach_.default.redispatch(ANY_AUTOGRAD, x)
    if state.lowering:
        x._chain = stopped(x._chain, x.shape)
    return out
