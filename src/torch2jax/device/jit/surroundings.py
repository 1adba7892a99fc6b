"""Python state that a compiled function reads is looked at before each call.

NOTE [What selects a program]. A function reads more than its arguments: flags, numbers, hooks and
tensors of the modules and objects that it can reach. From the function we follow closures, globals
that its code names, bound objects, partials, modules with all that they hold, optimizers, objects
of classes that are neither Python's nor PyTorch's, dicts, lists and tuples. What is found makes a
key. Numbers and strings are in it by value, and functions by their code. Tensors are in it by
dtype, by shape, by whether they need a gradient, and by which of them are the same or share memory;
leaves that need a gradient are in it by identity. Values and other identities are not in the key,
so tensors that were put in the place of others are operands of the same program.

Most calls find everything as it was, by one pass that compares the values of all containers by
identity.

While the function is traced it may put tensors into these places. They are outputs of the program,
and each call puts its own there. After the trace the old contents are put back, so no tracer stays.
"""

from __future__ import annotations

import itertools
import operator
import types
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as torch_tree

from ..tensors.tensor import OPTIONS, Tensor, become, make
from .walk import EMPTY, Walk, contents, meta

__all__ = ["Change", "State", "Surroundings"]

_END = object()
_cell = operator.attrgetter("_cell")
_needs = operator.attrgetter("requires_grad")
_version = operator.attrgetter("_version")


class State:
    """A state is one key of the surroundings, with the programs for it."""

    def __init__(self, pins: list[Any]) -> None:
        self.pins = pins
        """Objects that the key names by their addresses; they are kept alive here."""
        self.calls: dict[Any, Any] = {}


class Change(NamedTuple):
    """A change has the items of a numbered container that were set (all, in a list) or deleted."""

    container: int
    new: dict[Any, Any]
    gone: list[Any]


class Surroundings:
    """An instance knows what one function reads; see NOTE [What selects a program]."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self.states: dict[Any, State] = {}
        self.current: State | None = None
        self.generation = 0
        """How often tensors were found in other places, or other tensors in the same places."""
        self.tensors: list[Tensor] = []
        self.generators: list[Any] = []
        self.containers: list[Any] = []
        self.volatile: set[tuple[int, Any]] = set()
        """Items that every call changes by itself; they select nothing."""
        self.names: set[str] = {"forward", "__call__"}

    def look(self) -> State:
        """Return the current state."""
        if self.current is not None and self._unchanged():
            return self.current
        known = -1
        while known < len(self.names):  # a walk finds more names of attributes in code
            known = len(self.names)
            walk = Walk(self.volatile, self.names)
            walk.value(self.fn, 0)
        key = tuple(walk.key)
        state = self.states.get(key)
        if state is None:
            state = self.states[key] = State(walk.pins)
        if self.current is not None and state is not self.current:
            for call in self.current.calls.values():
                call.release()
        self.tensors, self.generators = walk.tensors, walk.generators
        self.metas, self.containers, self._read_of = walk.metas, walk.containers, walk.read_of
        self._reads = [*walk.reads, lambda: (_END,)]
        self._values = [*itertools.chain.from_iterable(read() for read in self._reads)]
        self._empty = walk.empty
        self._cells = list(map(_cell, self.tensors))
        self._grads = list(map(_needs, self.tensors))
        self._foreign = walk.foreign
        self._versions = list(map(_version, self._foreign))
        self._places: dict[Any, int] | None = None
        self.current = state
        self.generation += 1
        return state

    def _unchanged(self) -> bool:
        now = itertools.chain.from_iterable(map(operator.call, self._reads))
        return (
            all(map(operator.is_, now, self._values))
            and not any(self._empty)
            and list(map(_cell, self.tensors)) == self._cells
            and list(map(_needs, self.tensors)) == self._grads
            and (not self._foreign or list(map(_version, self._foreign)) == self._versions)
        )

    def numbers(self) -> dict[int, int]:
        """Return the numbers of the tensors by the addresses of their memory."""
        return {id(t._cell): n for n, t in reversed([*enumerate(self.tensors)])}

    # --- what happens to it while a function is traced, or runs

    def save(self) -> list[Any]:
        """Return all items and tensors as they are."""
        items = [(c, _items(c)) for c in self.containers]
        tensors = [
            (t, t._cell, t._chain, (t.shape, t.stride(), t.storage_offset()), t.dtype)
            for t in self.tensors
        ]
        return [items, tensors]

    def changes(self, saved: list[Any]) -> list[Change]:
        """Return the items that are others now."""
        found = []
        for number, (container, before) in enumerate(saved[0]):
            after = _items(container)
            new = {k: v for k, v in after.items() if k not in before or before[k] is not v}
            gone = [k for k in before if k not in after]
            if new or gone:
                everything = isinstance(container, list)
                found.append(Change(number, after if everything else new, gone))
        return found

    def is_volatile(self, change: Change) -> bool:
        container = self.containers[change.container]
        items = self._items_of(container, change)
        return bool(items) and self.volatile.issuperset(items)

    def _items_of(self, container: Any, change: Change) -> set[tuple[int, Any]]:
        keys = (None,) if isinstance(container, list) else (*change.new, *change.gone)
        return {(id(container), k) for k in keys}

    def numbers_set(self, changes: list[Change]) -> set[tuple[int, Any]]:
        """Return the items that were set to something without a tensor."""
        found: set[tuple[int, Any]] = set()
        for c in changes:
            if not any(isinstance(x, torch.Tensor) for x in torch_tree.tree_leaves(c.new)):
                found |= self._items_of(self.containers[c.container], c)
        return found

    def moved(self, saved: list[Any]) -> list[tuple[int, Tensor]]:
        """Return the tensors that ``x.data = y`` has given other memory, with their numbers."""
        return [(n, t) for n, (t, cell, *_) in enumerate(saved[1]) if t._cell is not cell]

    def restore(self, saved: list[Any]) -> None:
        """Put all items and tensors back as they were."""
        for container, before in saved[0]:
            after = _items(container)
            if len(after) == len(before) and all(
                map(operator.is_, after.values(), before.values())
            ):
                continue
            if isinstance(container, list):
                container[:] = before.values()
            elif isinstance(container, types.CellType):
                _fill(container, before)
            else:
                for key in after.keys() - before.keys():
                    del container[key]
                container.update(before)
        for t, cell, chain, place, dtype in saved[1]:
            if t._cell is not cell:
                old = make(Tensor, *place, dtype=dtype, **OPTIONS)
                old._cell, old._chain = cell, chain
                become(t, old)

    def put(self, change: Change, values: dict[Any, Any]) -> None:
        """Set items as the trace did."""
        container = self.containers[change.container]
        if isinstance(container, list):
            container[:] = values.values()
        elif isinstance(container, types.CellType):
            container.cell_contents = values[0]
        else:
            for key in change.gone:
                container.pop(key, None)
            container.update(values)
            if not change.gone:
                self._replaced(container, values)

    def _replaced(self, changed: dict[Any, Any], values: dict[Any, Any]) -> None:
        """Note new tensors in the place of others of their kind, which need no new walk."""
        if self._places is None:
            self._places, self._uses, at = {}, {}, 0
            for i, read in enumerate(self._reads):
                container = self._read_of.get(i)
                count = len(list(read()))
                for n, k in enumerate(container if isinstance(container, dict) else ()):
                    self._places[id(container), k] = at + n
                at += count
            if at != len(self._values):  # the values have other items as well
                self._places = None
                return
            for v in self._values:
                self._uses[id(v)] = self._uses.get(id(v), 0) + 1
            self._numbers = {id(t): n for n, t in enumerate(self.tensors)}
        for key, new in values.items():
            place = self._places.get((id(changed), key))
            if place is None:
                return
            old = self._values[place]
            number = self._numbers.get(id(old))
            if number is None or self._uses[id(old)] != 1 or type(new) is not Tensor:
                return
            if meta(new) != self.metas[number] or self._cells.count(old._cell) != 1:
                return
            if id(new) in self._numbers:
                return
            del self._numbers[id(old)], self._uses[id(old)]
            self._numbers[id(new)], self._uses[id(new)] = number, 1
            self._values[place] = self.tensors[number] = new
            self._cells[number], self._grads[number] = new._cell, new.requires_grad
        self.generation += 1


def _items(container: Any) -> dict[Any, Any]:
    if isinstance(container, dict):
        return dict(dict.items(container))
    if isinstance(container, types.CellType):
        return {0: contents(container)}
    return dict(enumerate(list.__iter__(container)))


def _fill(cell: Any, before: dict[Any, Any]) -> None:
    if before[0] is EMPTY:
        del cell.cell_contents
    else:
        cell.cell_contents = before[0]
