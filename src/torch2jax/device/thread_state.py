"""What is under way on this thread: a trace whose derivatives JAX takes, a decomposition."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["lowering_scope", "other_devices_allowed", "state"]


class _State(threading.local):
    lowering = 0  # inside torch2jax(..., lower=True), whose derivatives are JAX's
    constants: Any = None  # tensors of other devices that the trace under way has met
    other_devices = 0  # where tensors of other devices may stand beside ours
    events: Any = None  # what a report notes
    composite = 0  # inside a decomposition
    active: tuple[Any, ...] = ()  # the operators whose decompositions are under way
    factories_traced = False  # large results of operators without operands are tracers
    watches = 0  # modes of our own around what is compiled
    compiling = False  # a decomposition for eager mode
    float64_is_float32 = False  # without x64: a cast to float64 gives float32


state = _State()


@contextlib.contextmanager
def lowering_scope() -> Iterator[None]:
    """While PyTorch code runs on tracers whose derivatives JAX takes."""
    before, state.constants = state.constants, {}
    state.lowering += 1
    try:
        yield
    finally:
        state.lowering -= 1
        state.constants = before


@contextlib.contextmanager
def other_devices_allowed() -> Iterator[None]:
    """While tensors of other devices may be operands."""
    state.other_devices += 1
    try:
        yield
    finally:
        state.other_devices -= 1
