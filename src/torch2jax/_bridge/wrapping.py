"""Wrapping gives the same object for the same function and options."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from .calls.function import TorchFunction
from .calls.options import Options

_CPU = torch.device("cpu")


process_lock = threading.RLock()
"""``lock=True`` stands for this lock, of which the process has one."""

_lock = threading.Lock()
_wrapped: weakref.WeakValueDictionary[Hashable, TorchFunction] = weakref.WeakValueDictionary()

Wrapped = TypeVar("Wrapped", bound=TorchFunction)


def wrapped(kind: type[Wrapped], fn: Callable[..., Any], label: str, options: Options) -> Wrapped:
    """Wrap ``fn``; the same function, options and kind give the same object."""
    key = (kind, _identity(fn), *options.key(label))
    with _lock:
        found = _wrapped.get(key)
        if found is None:
            found = _wrapped[key] = kind(fn, _prepared(fn, options), label, options)
    return found  # type: ignore[return-value]  # its kind is a part of the key


def _prepared(fn: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """Return ``fn`` as it runs: under its lock and the default device of wrap time."""
    contexts: list[Any] = [options.lock] if options.lock is not None else []
    if options.default_device != _CPU:
        contexts.append(options.default_device)
    if not contexts:
        return fn

    def prepared(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return fn(*args, **kwargs)

    return prepared


def _identity(fn: Any) -> Hashable:
    """Return a key that is equal for the same function.

    A bound method is a new object at every access, so its parts count. A wrapped function keeps
    ``fn`` alive, so that no other object gets its id.
    """
    if hasattr(fn, "__func__") and hasattr(fn, "__self__"):
        return (id(fn.__self__), id(fn.__func__))
    return id(fn)
