"""Where something outside of a trace keeps its tensors, they are taken out again.

A function under ``functools.lru_cache`` that is first called in a trace returns a tensor on device
"jax", perhaps a tracer. Plain PyTorch and the next trace must not meet it there.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import weakref
from collections.abc import Iterator

from ..._bridge.torch_side.exceptions import clear_frames
from ..._bridge.torch_side.preserving import take_out
from ...lowerings.registry import ValuesAsked
from ..tensors.tensor import Cell, Observer, Tensor, captures
from ..thread_state import state

__all__ = ["nothing_kept", "take_out_what_was_kept"]


class _Made(Observer):
    """It collects the memory that this thread makes."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.cells: list[weakref.ref[Cell]] = []

    def born(self, cell: Cell) -> None:
        if threading.get_ident() == self.thread:
            self.cells.append(weakref.ref(cell))

    def alive(self) -> list[Cell]:
        return [c for ref in self.cells if (c := ref()) is not None]

    def take_out(self) -> None:
        if self.alive():
            gc.collect()
            if cells := self.alive():
                take_out(_tensors_of(cells))


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Let no tensor that is made inside outlive this scope in caches, even after an error.

    An error keeps what its frames see, and to look past that takes a walk through all objects. So
    where a trace asks for values and will be made again, ``take_out_what_was_kept`` looks when the
    error is gone.
    """
    made = _Made()
    captures.append(made)
    later, handled = False, sys.exc_info()[1]
    try:
        yield
    except BaseException as error:
        clear_frames(error, handled)
        later = state.choice is not None and isinstance(error, ValuesAsked)
        raise
    finally:
        captures.remove(made)
        if later:
            state.asking_traces += (made,)
        else:
            made.take_out()


def take_out_what_was_kept() -> None:
    """Take out what the traces that asked for values left in caches."""
    traces, state.asking_traces = state.asking_traces, ()
    for made in traces:
        made.take_out()


def _tensors_of(cells: list[Cell]) -> list[Tensor]:
    found: list[Tensor] = []
    for x in gc.get_referrers(*cells):
        owners = gc.get_referrers(x) if isinstance(x, dict) else [x]
        found += [t for t in owners if isinstance(t, Tensor)]
    return found
