"""Ambient state is what a thread or the process has switched on in torch around a call of ``fn``.

``fn`` always runs with autocast off, no torch modes, gradients off and the default dtype of wrap
time, whichever thread XLA picks. The handler asks ``ambient_clean`` once per execution of an
executable on a thread; where the answer is no, each call goes through ``run_guarded``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C import _functorch  # type: ignore[attr-defined]
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes

_AUTOCAST_DEVICES = ("cpu", "cuda")

# These are looked up once, because the handler asks at every execution of an executable.
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = _functorch.peek_interpreter_stack
_autocast = torch._C._is_any_autocast_enabled
_inference_mode = torch.is_inference_mode_enabled
_default_dtype = torch.get_default_dtype


def ambient_clean(default_dtype: torch.dtype) -> bool:
    """Return whether the calling thread has nothing on that would change what ``fn`` does."""
    return (
        _default_dtype() is default_dtype
        and not _function_modes()
        and not _dispatch_modes()
        and not _autocast()
        and not _inference_mode()
        and _transforms() is None
    )


@contextlib.contextmanager
def clean_surroundings(default_dtype: torch.dtype) -> Iterator[None]:
    """Switch off the calling thread's modes, autocast, transforms and gradients; then restore."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(temporarily_clear_interpreter_stack())
        for _ in range(torch._C._len_torch_function_stack()):
            stack.callback(_push_mode, _pop_mode())
        stack.enter_context(_disable_current_modes())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for device in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        before = torch.get_default_dtype()
        if before is not default_dtype:
            torch.set_default_dtype(default_dtype)
            stack.callback(torch.set_default_dtype, before)
        stack.enter_context(torch.no_grad())
        yield


def run_guarded(run: Callable[..., Any], args: tuple[Any, ...], default_dtype: torch.dtype) -> Any:
    """Call ``run(*args)`` in a clean state."""
    with clean_surroundings(default_dtype):
        return run(*args)
