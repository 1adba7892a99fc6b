"""Where something outside of a trace keeps its tensors, they are taken out again.

A function under ``functools.lru_cache`` that is first called in a trace returns a tensor on device
"jax", perhaps a tracer. Plain PyTorch and the next trace must not meet it there.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import traceback
import weakref
from collections.abc import Iterator

from ..._bridge.torch_side.preserving import take_out
from ..tensors.tensor import Cell, Observer, Tensor, captures

__all__ = ["nothing_kept"]


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


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Let no tensor that is made inside outlive this scope in caches, even after an error."""
    made = _Made()
    captures.append(made)
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        captures.remove(made)
        if made.alive():
            gc.collect()
            if cells := made.alive():
                take_out(_tensors_of(cells))


def _tensors_of(cells: list[Cell]) -> list[Tensor]:
    found: list[Tensor] = []
    for x in gc.get_referrers(*cells):
        owners = gc.get_referrers(x) if isinstance(x, dict) else [x]
        found += [t for t in owners if isinstance(t, Tensor)]
    return found
