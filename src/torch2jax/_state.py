"""torch's ambient state: what a thread or the process has switched on around a call of ``fn``.

``fn`` always runs with autocast off, no torch modes, gradients off and the default dtype of wrap
time, whichever thread XLA picks. The handler asks ``ambient_clean`` once per execution of an
executable on a thread; where the answer is no, each call goes through ``run_guarded``.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C import _functorch  # type: ignore[attr-defined]
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes

from ._errors import Torch2JaxError

_AUTOCAST_DEVICES = ("cpu", "cuda")

# Looked up once: the handler asks at every execution of an executable.
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = _functorch.peek_interpreter_stack
_autocast = torch._C._is_any_autocast_enabled
_inference_mode = torch.is_inference_mode_enabled
_default_dtype = torch.get_default_dtype


def ambient_clean(default_dtype: torch.dtype) -> bool:
    """Whether the calling thread has nothing switched on that would change what ``fn`` does."""
    return (
        _default_dtype() is default_dtype
        and not _function_modes()
        and not _dispatch_modes()
        and not _autocast()
        and not _inference_mode()
        and _transforms() is None
    )


@contextlib.contextmanager
def clean(default_dtype: torch.dtype) -> Iterator[None]:
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
    """``run(*args)`` in a clean state."""
    with clean(default_dtype):
        return run(*args)


def run_on_stream(
    body: Callable[..., Any],
    args: tuple[Any, ...],
    stream: int,
    device_index: int,
    default_dtype: torch.dtype,
) -> Any:
    """``body(*args)`` in a clean state, with ``stream`` as torch's current stream of the device.

    The handler orders it after work that torch has queued on its own stream, and before later work.
    """
    ours = torch.cuda.ExternalStream(stream, device=device_index)
    with torch.cuda.device(device_index), torch.cuda.stream(ours):
        return run_guarded(body, args, default_dtype)


def current_stream(device_index: int) -> int:
    """The address of torch's current stream of a device."""
    return torch.cuda.current_stream(device_index).cuda_stream


# --- one of several devices ----------------------------------------------------------------------


class _Thread(threading.local):
    one_of_several = False


_thread = _Thread()


def on_one_of_several(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, on a thread that knows that its program runs on several devices at once."""

    def call(*args: Any) -> Any:
        before, _thread.one_of_several = _thread.one_of_several, True
        try:
            return run(*args)
        finally:
            _thread.one_of_several = before

    return call


def check_may_call_jax(what: str) -> None:
    """Raise inside a call that runs on one of several devices: calling JAX there deadlocks.

    Devices wait for each other in a collective, and what is called waits for a device.
    """
    if _thread.one_of_several:
        raise Torch2JaxError(
            f"{what} is called inside a torch2jax function that runs on several devices at once. "
            "Calling JAX from there deadlocks when the devices wait for each other: make the JAX "
            "call outside, or compose the functions in JAX."
        )


# --- exceptions that cross XLA -----------------------------------------------------------------

_KEPT = 16
_exceptions: OrderedDict[str, BaseException] = OrderedDict()


def describe_exception(label: str, error: BaseException) -> str:
    """The text that XLA carries for an exception in ``fn``; the exception is kept for its caller.

    Frames are cleared: their locals are views of XLA's memory, which is about to be used again.
    """
    text = "".join(traceback.format_exception(error)).rstrip()
    try:
        summary = f"{type(error).__name__}: {error}"
    except Exception:
        summary = f"{type(error).__name__} (whose __str__ raises)"
    message = f"{label} raised {summary}\n\n{text}"
    seen: set[int] = set()
    chained: BaseException | None = error
    while chained is not None and id(chained) not in seen:
        seen.add(id(chained))
        traceback.clear_frames(chained.__traceback__)
        chained = chained.__cause__ or chained.__context__
    _exceptions[message] = error
    while len(_exceptions) > _KEPT:
        _exceptions.popitem(last=False)
    return message


def take_exception(text: str) -> tuple[str, BaseException] | None:
    """The message and exception of ``describe_exception`` that an error of XLA carries."""
    for message in reversed(_exceptions):
        if message in text:
            return message, _exceptions.pop(message)
    return None
