"""Each thread has a state: whether a trace, a decomposition or a report is under way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["derivatives_kept", "lowering_scope", "other_devices_allowed", "state"]


class _State(threading.local):
    resume: Any = contextlib.nullcontext
    """A context that restores the thread's state of the innermost trace for JAX's derivative."""
    lowering = 0
    """How many scopes of ``lower=True``, where JAX takes the derivatives, are entered."""
    kept = 0
    """How many scopes are entered where JAX's derivative goes on although gradients are off."""
    backward_passes = 0
    """How many backward passes of autograd functions are traced for JAX's derivative."""
    detaching = 0
    """How many calls of the user's ``detach`` are under way."""
    checks: tuple[Any, ...] = ()
    """What is to be called when the scope of ``lower=True`` that was entered last ends well."""
    constants: Any = None
    """Tensors of other devices that the trace under way has met."""
    other_devices = 0
    """How many scopes are entered where tensors of other devices may stand beside ours."""
    events: Any = None
    """The ``Events`` that a report collects."""
    composite = 0
    """How many decompositions are under way."""
    active: tuple[Any, ...] = ()
    """The operators whose decompositions are under way."""
    factories_traced = False
    """Whether large results of operators without operands are tracers."""
    watches = 0
    """How many dispatch modes of our own are entered."""
    compiling = False
    """Whether a decomposition is compiled for eager mode."""
    modules: Any = None
    """The calls of modules in the trace under way; see ``tracing/bridged_modules.py``."""
    choice: Any = None
    """Whose next trace calls which modules through the bridge."""
    asking_traces: tuple[Any, ...] = ()
    """What the traces made that asked for values; see ``tracing/kept.py``."""
    copying: Any = None
    """What stands for a tensor of ours in a copy that is made, as a function of the tensor."""
    strict = False
    """Whether the trace under way calls nothing through the bridge."""
    float64_is_float32 = False
    """Whether a cast to float64 gives float32 while x64 is off."""


state = _State()


@contextlib.contextmanager
def lowering_scope() -> Iterator[None]:
    """In this scope PyTorch code runs on tracers, and JAX takes the derivatives."""
    before = state.constants, state.checks
    state.constants, state.checks = {}, ()
    state.lowering += 1
    try:
        yield
        for check in state.checks:
            check()
    finally:
        state.lowering -= 1
        state.constants, state.checks = before


@contextlib.contextmanager
def derivatives_kept() -> Iterator[None]:
    """In this scope JAX's derivative goes on although gradients are off."""
    state.kept += 1
    try:
        yield
    finally:
        state.kept -= 1


@contextlib.contextmanager
def other_devices_allowed() -> Iterator[None]:
    """In this scope tensors of other devices may be operands."""
    state.other_devices += 1
    try:
        yield
    finally:
        state.other_devices -= 1
