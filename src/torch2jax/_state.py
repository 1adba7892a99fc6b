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


# --- forked processes ----------------------------------------------------------------------------


def refuse_forked(*_: Any, **__: Any) -> Any:
    """What stands for a call in a process that was forked: threads of JAX and locks are missing."""
    raise Torch2JaxError(
        "a torch2jax function is called in a process made by os.fork(), in which the threads of "
        "JAX and PyTorch do not exist and their locks may be held for ever. Start processes by "
        'multiprocessing.get_context("spawn") or "forkserver".'
    )


# --- exceptions that cross XLA -----------------------------------------------------------------

_KEPT = 16
_exceptions: OrderedDict[str, BaseException] = OrderedDict()
_exceptions_lock = threading.RLock()
"""Reentrant: dropping an exception may run anything, a call that fails too."""


def describe_exception(label: str, error: BaseException) -> str:
    """The text that XLA carries for an exception in ``fn``; the exception is kept for its caller.

    Frames are cleared and tensors that the exception carries are copied: they may be views of XLA's
    memory, which is about to be used again.
    """
    text = "".join(traceback.format_exception(error)).rstrip()
    try:
        summary = f"{type(error).__name__}: {error}"
    except Exception:
        summary = f"{type(error).__name__} (whose __str__ raises)"
    message = f"{label} raised {summary}\n\n{text}"
    for each in _with_its_causes(error):
        traceback.clear_frames(each.__traceback__)
        _own_tensors(each)
    with _exceptions_lock:
        _exceptions[message] = error
        while len(_exceptions) > _KEPT:
            _exceptions.popitem(last=False)
    return message


def _with_its_causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, what it comes from, and the members of groups, each once."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        each = pending.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        pending += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            pending += each.exceptions


def _own_tensors(error: BaseException) -> None:
    """Tensors among the arguments and attributes of an exception become copies."""
    with contextlib.suppress(Exception):  # a class may refuse either
        if any(isinstance(x, torch.Tensor) for x in error.args):
            error.args = tuple(_owned(x) for x in error.args)
        for name, x in list(vars(error).items()):
            if isinstance(x, torch.Tensor):
                setattr(error, name, _owned(x))


def _owned(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, torch.Tensor) else x


def take_exception(text: str) -> tuple[str, BaseException] | None:
    """The message and exception of ``describe_exception`` that an error of XLA carries."""
    with _exceptions_lock:
        for message in reversed(_exceptions):
            if message in text:
                return message, _exceptions.pop(message)
    return None
