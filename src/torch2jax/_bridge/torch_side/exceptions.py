"""Exceptions of a user's function are kept until the call that failed can raise them."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch

_MOST = 16
_exceptions: OrderedDict[str, BaseException] = OrderedDict()
_exceptions_lock = threading.RLock()
"""It is reentrant, because dropping an exception may run anything, even a call that fails."""


def describe_exception(label: str, error: BaseException) -> str:
    """Return the text that XLA carries for an exception in ``fn``.

    The exception is kept for its caller. Its frames are cleared, and tensors that it carries are
    copied: they may be views of XLA's memory, which is about to be used again.
    """
    text = "".join(traceback.format_exception(error)).rstrip()
    try:
        summary = f"{type(error).__name__}: {error}"
    except Exception:
        summary = f"{type(error).__name__} (whose __str__ raises)"
    message = f"{label} raised {summary}\n\n{text}"
    clear_frames(error)
    for each in _with_its_causes(error):
        _own_tensors(each)
    with _exceptions_lock:
        _exceptions[message] = error
        while len(_exceptions) > _MOST:
            _exceptions.popitem(last=False)
    return message


def clear_frames(error: BaseException, handled: BaseException | None = None) -> None:
    """Let the frames of an exception, and of those that it comes from, keep no variables.

    ``handled`` is the user's, in whose ``except`` the failed call was made: it stays as it is.
    """
    for each in _with_its_causes(error, handled):
        traceback.clear_frames(each.__traceback__)


def _with_its_causes(
    error: BaseException, handled: BaseException | None = None
) -> Iterator[BaseException]:
    """Yield the exception, what it comes from, and the members of groups, each once."""
    pending: list[BaseException | None] = [error]
    seen = {id(handled)}
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
    """Make copies of the tensors among an exception's arguments and attributes."""
    with contextlib.suppress(Exception):  # a class may refuse either
        if any(isinstance(x, torch.Tensor) for x in error.args):
            error.args = tuple(_owned(x) for x in error.args)
        for name, x in list(vars(error).items()):
            if isinstance(x, torch.Tensor):
                setattr(error, name, _owned(x))


def _owned(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, torch.Tensor) else x


def take_exception(text: str) -> tuple[str, BaseException] | None:
    """Return the message and exception of ``describe_exception`` that an error of XLA carries."""
    with _exceptions_lock:
        for message in reversed(_exceptions):
            if message in text:
                return message, _exceptions.pop(message)
    return None
