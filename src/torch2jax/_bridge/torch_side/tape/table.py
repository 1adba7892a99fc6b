"""The tape keeps graphs of forward passes for their backward passes.

It is a table of this process, of bounded size; the programs of ``programs.py`` write and read it.
This file imports torch, never JAX.
"""

from __future__ import annotations

import functools
import os
import secrets
import threading
import warnings
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from ...._errors import SignatureError, Torch2JaxWarning
from ...._html import bar, bytes_of, page, table
from ...._plots import bars
from ..gradients import Tensor
from ..words import call_site, execution, words_of
from .habits import Account, Habit
from .kept_graph import GraphPolicy, KeptGraph
from .sites import Token, Waiting

_ENVIRONMENT = f"{__name__.partition('.')[0].upper()}_TAPE_BYTES"


def no_token() -> Tensor:
    """Return the words of the token that stands for no graph; the handler copies them."""
    return torch.zeros(4, dtype=torch.uint32)


_NO_TOKEN = (0, 0, 0, 0)


@dataclass
class TapeInfo:
    """A ``TapeInfo`` says what the tape holds and has done in this process.

    Attributes:
      entries: graphs that are kept now.
      bytes: the bytes of their activations.
      budget: bytes that may be kept on each device; None for a quarter of its memory, on a GPU at
        most half of what is free for PyTorch there.
      hits: backward passes that found their graph.
      misses: backward passes that ran forward again.
      evictions: graphs that were dropped for the budget, or because no backward pass of their
        function has ever come so late.
      on_copies: functions whose operands are copied, because their graphs cannot be kept on views
        of XLA's memory.
    """

    entries: int = 0
    bytes: int = 0
    budget: int | None = None
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    on_copies: list[str] = field(default_factory=list)

    def plot(self, axes: Any = None) -> Any:
        """Draw how many backward passes found their graph; return the axes. It needs matplotlib.

        Args:
          axes: matplotlib's axes to draw into; by default those of a new figure.
        """
        rows = {
            "found their graph": {"backward passes": self.hits},
            "ran forward again": {"backward passes": self.misses},
            "graphs kept now": {"graphs": self.entries},
            "graphs dropped": {"graphs": self.evictions},
        }
        title = f"The tape: {bytes_of(self.bytes)} are kept"
        return bars(rows, title, "backward passes, graphs", axes)

    def _repr_html_(self) -> str:
        budget = "a quarter of the memory" if self.budget is None else bytes_of(self.budget)
        held = {f"{bytes_of(self.bytes)} are kept by {self.entries} graphs": self.bytes}
        passes = {
            f"{self.hits} backward passes found their graph": self.hits,
            f"{self.misses} ran forward again": self.misses,
        }
        rows = [["budget on each device", budget], ["dropped for the budget", self.evictions]]
        rows += [["runs on copies of its operands", name] for name in self.on_copies]
        return page("The tape", bar(held, self.budget), bar(passes), table(["", ""], rows))


def _budget_of_environment() -> int | None:
    given = os.environ.get(_ENVIRONMENT, "")
    if given and not given.isdecimal():
        raise SignatureError(f"{_ENVIRONMENT}={given!r} must be a number of bytes: 4000000000.")
    return int(given) if given else None


class Tape:
    """The tape has kept graphs by token, the least recently used first."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._graphs: OrderedDict[Token, KeptGraph] = OrderedDict()
        self._accounts: defaultdict[torch.device, Account] = defaultdict(Account)
        self._used: OrderedDict[Token, None] = OrderedDict()
        self._waiting = Waiting()
        self._nonce = secrets.randbits(63) + 1
        self._count = 0
        self._fresh: list[tuple[Token, Tensor]] = []
        """Tokens to come, with their words. They are made in blocks, as each costs microseconds."""
        self._budget = _budget_of_environment()
        self._hits = self._misses = self._evictions = 0
        self._warned = False
        self._copying: dict[str, None] = {}

    def add(self, graph: KeptGraph) -> Tensor:
        """Keep ``graph``, and return a tensor with the words of its token, on the CPU.

        The handler copies the words to a GPU. A copy under the lock could wait for a collective
        that another device joins only once it has the lock.
        """
        with self._lock:
            if not self._fresh:
                self._fresh = self._new_tokens()
            token, words = self._fresh.pop()
            if graph.device.type == "cuda":
                self._waiting.made(token, call_site())
            habit = graph.policy.habits.get(graph.device)
            if habit is None:
                habit = graph.policy.habits[graph.device] = Habit()
            now = execution()
            habit.made(token, graph.storages, now)
            self._enter(token, graph, self._accounts[graph.device])
            if self._budget is None:
                self._drop_overdue(habit, now)
            return words

    def add_nothing(self, device: torch.device) -> Tensor:
        """Return the words of a call's token that keeps no graph."""
        if device.type == "cuda":
            with self._lock:  # it counts among the tokens of its site
                self._count += 1
                self._waiting.made((*_NO_TOKEN, self._count), call_site())
        return no_token()

    def _new_tokens(self) -> list[tuple[Token, Tensor]]:
        high, low = self._nonce >> 32, self._nonce & 0xFFFFFFFF
        counts = range(self._count, self._count + 64)
        self._count += 64
        tokens = [(high, low, n >> 32, n & 0xFFFFFFFF) for n in counts]
        block = torch.tensor(tokens, dtype=torch.uint32)
        return list(zip(tokens, block.unbind(), strict=True))

    def restore(self, token: Token, graph: KeptGraph) -> None:
        """Keep ``graph`` under ``token``, and evict what is beyond the budget."""
        with self._lock:
            if graph.reused:
                # One graph that is used again and again is kept per function, the latest.
                for other, kept in list(self._graphs.items()):
                    if kept.reused and kept.policy is graph.policy:
                        self._remove(other)
            self._enter(token, graph, self._accounts[graph.device])

    def _enter(self, token: Token, graph: KeptGraph, account: Account) -> None:
        if graph.policy.copies:
            self._copying[graph.policy.label] = None
        self._graphs[token] = graph
        account.enter(graph.storages)
        self._evict(graph.device, account)

    def _evict(self, device: torch.device, account: Account) -> None:
        budget = default_budget(device) if self._budget is None else self._budget
        while account.bytes > budget or budget == 0:
            oldest = next((t for t, g in self._graphs.items() if g.device == device), None)
            if oldest is None:  # a budget of 0 keeps no graph, not even one without activations
                return
            self._remove(oldest)
            self._evicted(budget)

    def _drop_overdue(self, habit: Habit, now: int) -> None:
        """Drop graphs that nobody will take, by what their function has taught."""
        while (token := habit.overdue(now)) is not None:
            self._remove(token)
            self._evictions += 1

    def name_of(self, words: Tensor) -> Token:
        """Return the token that these words are. See NOTE [Sites]."""
        if not words.is_cuda:
            return tuple(words.tolist())
        with self._lock:
            token = self._waiting.only(call_site())
        return tuple(words_of(words)) if token is None else token

    def take(self, token: Token, policy: GraphPolicy, device: torch.device) -> KeptGraph | None:
        """Return the graph under ``token``, if there is one of this function on ``device``."""
        with self._lock:
            if device.type == "cuda":
                self._waiting.taken(token)
            graph = self._graphs.get(token)
            habit = policy.habits.get(device)
            if graph is None or graph.policy is not policy or graph.device != device:
                self._misses += token[:4] != _NO_TOKEN
                if habit is not None:
                    habit.missed(token)
                return None
            self._hits += 1
            if habit is not None:
                habit.taken(token, execution())
            if graph.reused:
                self._graphs.move_to_end(token)
                return graph
            self._remove(token)
            self._used[token] = None
            if len(self._used) > 4096:
                self._used.popitem(last=False)
            return graph

    def used_up(self, token: Token) -> bool:
        """Return whether this token's graph was taken before, rather than evicted or unknown."""
        return token in self._used

    def evict(self, device: torch.device) -> None:
        """Drop the graphs on a device, whose memory ran out."""
        with self._lock:
            for token in [t for t, g in self._graphs.items() if g.device == device]:
                self._remove(token)
                self._evictions += 1

    def bytes_on(self, device: torch.device) -> int:
        """Return how many bytes the graphs on a device hold."""
        return self._accounts[device].bytes

    def clear(self) -> None:
        with self._lock:
            for token in list(self._graphs):
                self._remove(token)
            self._used.clear()

    def forget(self, policy: GraphPolicy) -> None:
        """Drop the graphs of a function that nobody can call any more."""
        with self._lock:
            for token in [t for t, g in self._graphs.items() if g.policy is policy]:
                self._waiting.taken(token)
                self._remove(token)

    def set_budget(self, budget: int | None) -> None:
        with self._lock:
            self._budget = budget
            for device, account in list(self._accounts.items()):
                self._evict(device, account)

    def info(self) -> TapeInfo:
        with self._lock:
            return TapeInfo(
                len(self._graphs),
                sum(account.bytes for account in self._accounts.values()),
                self._budget,
                self._hits,
                self._misses,
                self._evictions,
                list(self._copying),
            )

    def _remove(self, token: Token) -> None:
        graph = self._graphs.pop(token, None)
        if graph is not None:  # freeing another graph may have freed the callee of this one
            self._accounts[graph.device].leave(graph.storages)
            habit = graph.policy.habits.get(graph.device)
            if habit is not None:
                habit.left(token)

    def _evicted(self, budget: int) -> None:
        self._evictions += 1
        if not self._warned and budget > 0:
            self._warned = True
            warnings.warn(
                f"The tape holds more than its budget of {budget:,} bytes, so the oldest forward "
                "passes are dropped and their backward passes run forward again. Differentiate "
                "less at once, or raise the budget with set_tape_budget() or the environment "
                f"variable {_ENVIRONMENT}.",
                Torch2JaxWarning,
                stacklevel=2,
            )


@functools.cache
def default_budget(device: torch.device) -> int:
    """Return a quarter of the device's memory.

    On a GPU it is at most half of what is free for PyTorch when the tape first asks: JAX has taken
    its part of the card by then.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return min(total // 4, free // 2)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


tape = Tape()


def tape_info() -> TapeInfo:
    """Return what the tape holds: entries, bytes, budget; hits, misses and evictions so far.

    Examples:
      >>> tape_info().entries
      0
    """
    return tape.info()


def clear_tape() -> None:
    """Drop every kept graph. Backward passes that need one run forward again.

    Examples:
      >>> clear_tape()
    """
    tape.clear()


def set_tape_budget(bytes: int | None) -> None:
    """Set how many bytes of activations the tape keeps on each device.

    None stands for a quarter of its memory, on a GPU for at most half of what is free for PyTorch
    there when the tape is first used. With None the tape also drops graphs of former executions
    that wait far longer than any graph of their function has waited for its backward pass. 0 keeps
    nothing: every backward pass runs forward again.

    Raises:
      SignatureError: for anything but None and an int of at least 0.

    Examples:
      >>> set_tape_budget(2**30)
      >>> set_tape_budget(None)
    """
    if bytes is not None and (not isinstance(bytes, int) or bytes < 0):
        raise SignatureError(f"a tape budget is a number of bytes or None, got {bytes!r}.")
    tape.set_budget(bytes)
