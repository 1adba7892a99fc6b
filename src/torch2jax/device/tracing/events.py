"""A report notes the route of each operator, and the line of the user's code that called it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from ..thread_state import state

__all__ = ["Events", "line_of", "recorded"]


class Events:
    """It counts how often each ``(operator, route, line)`` occurs in a call.

    Of a module that goes through the bridge it counts ``(module, question, line)``.
    """

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str, str], int] = {}
        self.modules: dict[tuple[str, str, str], int] = {}

    def copy(self) -> Events:
        other = Events()
        other.restore(self)
        return other

    def restore(self, other: Events) -> None:
        """Count what another one has counted."""
        self.counts, self.modules = dict(other.counts), dict(other.modules)

    def add_module(self, name: str, question: str, line: str) -> None:
        key = (name, question, line)
        self.modules[key] = self.modules.get(key, 0) + 1

    def add(self, func: Any, route: str) -> None:
        key = (str(func), route, _line_of_user())
        self.counts[key] = self.counts.get(key, 0) + 1


@contextlib.contextmanager
def recorded() -> Iterator[Events]:
    before, state.events = state.events, Events()
    try:
        yield state.events
    finally:
        state.events = before


def _line_of_user() -> str:
    """Return ``file:line`` of the innermost frame that is not ours, PyTorch's or JAX's."""
    frame = sys._getframe(2)
    while frame is not None:
        if _is_users(frame):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def line_of(error: BaseException) -> str:
    """Return ``file:line`` of the user's code in which an error arose."""
    found, traceback = "?", error.__traceback__
    while traceback is not None:
        if _is_users(traceback.tb_frame):
            found = f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found


def _is_users(frame: FrameType) -> bool:
    root = frame.f_globals.get("__name__", "").split(".")[0]
    return root not in (_OURS, "torch", "jax", "jaxlib", "contextlib")


_OURS = __name__.split(".")[0]
