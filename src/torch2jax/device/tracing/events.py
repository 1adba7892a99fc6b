"""A report notes the route of each operator, and the line of the user's code that called it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from ..thread_state import state

__all__ = ["Events", "recorded"]


class Events:
    """It counts how often each ``(operator, route, line)`` occurs in a call."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str, str], int] = {}

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
    ours = __name__.split(".")[0]
    frame = sys._getframe(2)
    while frame is not None:
        root = frame.f_globals.get("__name__", "").split(".")[0]
        if root not in (ours, "torch", "jax", "jaxlib", "contextlib"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
