"""A trace finds the tensors that a function uses without getting them as arguments.

NOTE [What a compiled function closes over]. A PyTorch function reads and writes tensors that are
not among its arguments: a module's parameters, an optimizer's state. While it is traced, memory
(cells) from before the trace becomes an input when it is first read. Memory that is written to
becomes an output, and so does memory that was made in the trace and outlives it. After each call
the outputs are put into their cells. The first call runs step by step, so that state that is made
lazily (an optimizer's) is there when the second one is traced.

Code may ask for the values of such memory (``w.item()``, a mask as index). It gets them, and the
program holds while the memory has these values.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import torch
from jax.core import Tracer
from torch.utils import _pytree as torch_tree
from torch.utils._python_dispatch import TorchDispatchMode

from ..._errors import Torch2JaxError
from ..tensors.tensor import Cell, Observer, Tensor, captures
from ..thread_state import state

__all__ = ["MoreInputs", "Watch", "capturing", "noting_leaves"]


class Leaves(Observer):
    """An instance collects the leaves from before a call that a function uses on this thread."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.started = Cell(None).serial
        self.leaves: dict[int, weakref.ref[Tensor]] = {}

    def read(self, x: Tensor) -> None:
        self.seen(x)

    def seen(self, x: Tensor) -> None:
        if x.is_leaf and x._cell.serial < self.started and threading.get_ident() == self.thread:
            self.leaves[id(x)] = weakref.ref(x)

    def living(self) -> list[Tensor]:
        found = (ref() for ref in self.leaves.values())
        return [x for x in found if x is not None and x.is_leaf]


class Capture(Leaves):
    """A capture collects the memory that one trace reads, writes and makes on its thread.

    ``inputs`` are known to be read and hold tracers; ``before`` are the arrays that they held.
    """

    def __init__(self, inputs: Sequence[Cell], before: Sequence[Any]) -> None:
        super().__init__()
        self.known = set(map(id, inputs))
        self.held = {id(c): (c.array, a) for c, a in zip(inputs, before, strict=True)}
        """What a cell from before the trace holds until it is written to, and what it held."""
        self.constants: dict[int, tuple[Cell, Any]] = {}
        """Cells whose values decide what the trace does, with their arrays."""
        self.found: dict[int, tuple[Cell, Any]] = {}
        """Cells from before the trace that were not known before, with their arrays."""
        self.made: list[weakref.ref[Cell]] = []

    def born(self, cell: Cell) -> None:
        if threading.get_ident() == self.thread:
            self.made.append(weakref.ref(cell))

    def read(self, x: Tensor) -> None:
        self.seen(x)
        cell = x._cell
        if cell.serial > self.started or id(cell) in self.known or id(cell) in self.found:
            return
        if threading.get_ident() != self.thread or isinstance(cell.array, Tracer):
            return
        self.found[id(cell)] = (cell, cell.array)
        # The cell holds a tracer, so that whatever depends on it is traced.
        cell.array = jax.lax.optimization_barrier(cell.array)
        self.held[id(cell)] = (cell.array, self.found[id(cell)][1])

    def is_older(self, cell: Cell) -> bool:
        return cell.serial < self.started and threading.get_ident() == self.thread

    def is_as_before(self, cell: Cell) -> bool:
        return self.is_older(cell) and cell.array is self.held.get(id(cell), (None, None))[0]

    def has_values(self, cell: Cell) -> bool:
        if not self.is_older(cell):
            return False
        stand_in, before = self.held.get(id(cell), (None, None))
        return cell.array is stand_in and not isinstance(before, Tracer)

    def known_array(self, cell: Cell, array: Any) -> Any:
        if not self.is_older(cell):
            return array
        stand_in, before = self.held.get(id(cell), (array, array))
        if array is not stand_in or isinstance(before, Tracer):
            return array
        self.constants[id(cell)] = (cell, before)
        return before

    def survivors(self) -> list[Cell]:
        cells = [ref() for ref in self.made]
        return [c for c in cells if c is not None and isinstance(c.array, Tracer)]


class MoreInputs(Exception):
    """A trace has read cells, and drawn from generators, that its program has not as inputs."""

    def __init__(self, cells: list[Cell], draws: Any) -> None:
        self.cells, self.draws = cells, draws

    def check(self, generators: Sequence[Any]) -> None:
        """Of these the last trace has drawn; a function that makes its own has new ones again."""
        for g in generators:
            if isinstance(g, torch.Generator) and g._cdata not in self.draws.counts:  # type: ignore[attr-defined]
                raise Torch2JaxError(
                    "a function that is compiled for device jax draws from a torch.Generator that "
                    "it makes itself. Make it outside of the function: it is an input then, and "
                    "goes on from call to call."
                )


@contextlib.contextmanager
def noting_leaves() -> Iterator[Leaves]:
    capture = Leaves()
    captures.append(capture)
    try:
        yield capture
    finally:
        captures.remove(capture)


@contextlib.contextmanager
def capturing(inputs: Sequence[Cell], before: Sequence[Any]) -> Iterator[Capture]:
    capture = Capture(inputs, before)
    captures.append(capture)
    try:
        yield capture
    finally:
        captures.remove(capture)
        for cell, array in capture.found.values():
            cell.array = array


_DETACH: Any = torch.ops.aten.detach.default
_OURS: Any = Tensor


class Watch(TorchDispatchMode):
    """A watch refuses what would happen only once: writes to and draws on other devices."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: set[int] = set()
        self.kept: list[Any] = []

    def __enter__(self) -> Any:
        state.watches += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        state.watches -= 1
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for argument, x in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._refuse(func, x if isinstance(x, list | tuple) else [x])
        if func is _DETACH and not state.detaching and type(args[0]) is Tensor:
            # PyTorch itself detaches, past autograd's kernels. Its call must not meet them.
            return _OURS.__torch_dispatch__(func, types, args, kwargs)
        out = func(*args, **kwargs)
        for x in torch_tree.tree_leaves(out):
            if type(x) is torch.Tensor:
                if torch.Tag.nondeterministic_seeded in func.tags and x.device.type != "meta":
                    raise Torch2JaxError(
                        f"{func} draws random numbers on {x.device} while a function is compiled "
                        "for device jax: that would happen once, not at each call. Use "
                        'device="jax".'
                    )
                self.ours.add(id(x))
                self.kept.append(x)
        return out

    def _refuse(self, func: Any, written: Any) -> None:
        for x in written:
            if type(x) is torch.Tensor and id(x) not in self.ours:
                raise Torch2JaxError(
                    f"{func} writes to a tensor on {x.device} while a function is compiled for "
                    "device jax: that would happen once, not at each call. Keep such state on "
                    'the device: capturable=True for optimizers, tensor.to("jax") otherwise.'
                )
