"""The tape learns how late a function's graphs are taken. This file imports torch, never JAX.

NOTE [Habits]. A graph whose backward call never comes would stay until the budget is used up. So
each function has a habit on each device: its ``reach`` is how many graphs of the function were made
at most between one that was taken and its backward call, where that call was in another execution.
Of graphs that former executions made, the function keeps twice its reach and a few more, or what
weighs little.

Graphs of the execution under way stay, because their backward calls may come in it: a scan of
10,000 steps makes 10,000 graphs before it takes the first.

A graph that was dropped too early costs a forward pass, never a wrong result, and only once: its
backward call tells how late it came, and the reach grows.
"""

from __future__ import annotations

from collections import OrderedDict

from .sites import Token

FEW = 16
"""A function keeps so many graphs of former executions, whatever its reach."""

LITTLE = 2**26
"""A function keeps graphs of so many bytes in all, whatever its reach."""

_EACH = 2**12
"""Bytes that count for a graph beside its activations: Python's objects, and the nodes."""

_MOST_DROPPED = 4096


class Account:
    """An account counts what is kept: the bytes of storages, each of them once."""

    def __init__(self) -> None:
        self.bytes = 0
        self.storages: dict[int, tuple[int, int]] = {}
        """How many graphs hold a storage, and its bytes, by address. Each counts once."""

    def enter(self, storages: dict[int, int]) -> None:
        for address, size in storages.items():
            # An address may have been another storage's before: the larger size counts.
            graphs, counted = self.storages.get(address, (0, 0))
            self.storages[address] = graphs + 1, max(size, counted)
            self.bytes += max(size - counted, 0)

    def leave(self, storages: dict[int, int]) -> None:
        for address in storages:
            graphs, counted = self.storages.pop(address)
            if graphs > 1:
                self.storages[address] = graphs - 1, counted
            else:
                self.bytes -= counted


class Habit:
    """A habit says how late the graphs of one function on one device are taken."""

    def __init__(self) -> None:
        self.reach = 0
        self._made = 0
        self._kept: OrderedDict[Token, tuple[int, int, dict[int, int]]] = OrderedDict()
        """When a graph was made, as a number, in which execution, and its storages. The oldest is
        first."""
        self._dropped: OrderedDict[Token, int] = OrderedDict()
        self._account = Account()

    def made(self, token: Token, storages: dict[int, int], execution: int) -> None:
        """Count a graph that was made."""
        self._made += 1
        self._kept[token] = self._made, execution, storages
        self._account.enter(storages)

    def left(self, token: Token) -> None:
        """Count a graph that is no longer kept, for whatever reason."""
        kept = self._kept.pop(token, None)
        if kept is not None:
            self._account.leave(kept[2])

    def taken(self, token: Token, execution: int) -> None:
        """Learn from a backward call that found its graph."""
        kept = self._kept.get(token)
        if kept is not None and (kept[1] != execution or execution == 0):
            self.reach = max(self.reach, self._made - kept[0])

    def missed(self, token: Token) -> None:
        """Learn from a backward call that came too late."""
        number = self._dropped.pop(token, None)
        if number is not None:
            self.reach = max(self.reach, self._made - number)

    def overdue(self, execution: int) -> Token | None:
        """Forget a graph that will hardly be taken any more, and return it for the tape to drop."""
        if len(self._kept) <= 2 * self.reach + FEW:
            return None
        if self._account.bytes + _EACH * len(self._kept) <= LITTLE:
            return None
        token, (number, maker, _) = next(iter(self._kept.items()))
        if maker == execution and execution != 0:
            return None
        self.left(token)
        self._dropped[token] = number
        if len(self._dropped) > _MOST_DROPPED:
            self._dropped.popitem(last=False)
        return token
