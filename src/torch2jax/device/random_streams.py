"""Device "jax" draws from words that a seed and a counter give, or from a JAX key.

In eager mode each draw takes the next words of a generator: PyTorch's for the device, which
``torch.manual_seed`` seeds, or the caller's own. In a traced function draws take keys that are
split from its key, so no draw is a constant of the program.

NOTE [Generators in a compiled function]. A call of ``device.jit`` draws the words of all draws from
a caller's generator before the program runs, which takes them as operands. So the generator goes on
as in eager mode, and seeding it has its effect. A trace of the function finds how many draws there
are. Other traced functions are pure, and a draw from a generator is an error in them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from .._bridge.torch_side.seeding import seed_of
from .._compat.jax import trace_state_clean
from .._errors import SignatureError

__all__ = [
    "NO_WORDS",
    "Draws",
    "Stream",
    "current",
    "drawing_from",
    "get_state",
    "next_words",
    "refuse_generators",
    "seed",
    "set_state",
    "words_of",
]


NO_WORDS = np.zeros(2, np.uint32)
"""A program that draws nothing takes these words in the place of those of a key."""


def words_of(generator: torch.Generator, count: int) -> np.ndarray[Any, Any]:
    """Return the next words of a generator for ``count`` draws: uint32[count, 2]."""
    with _disable_current_modes():
        drawn = torch.randint(0, 2**32, (count, 2), generator=generator, device="cpu")
    return drawn.numpy().astype(np.uint32)


class Draws:
    """An instance counts one trace's draws from the caller's generators, and gives their words.

    ``given`` has words by generator. PyTorch wraps a generator anew for each operator, so
    ``_cdata`` tells which one it is.
    """

    def __init__(self, given: dict[int, Any]) -> None:
        self.given = given
        self.counts: dict[int, int] = {}
        self.generators: dict[int, torch.Generator] = {}

    def next(self, generator: torch.Generator) -> Any:
        which = generator._cdata  # type: ignore[attr-defined]
        count = self.counts.get(which, 0)
        self.counts[which], self.generators[which] = count + 1, generator
        words = self.given.get(which)
        if words is None or count >= len(words):  # this trace finds out how many there are
            return jax.lax.optimization_barrier(NO_WORDS)
        return words[count]


class Stream:
    """A stream has the keys for the draws of one traced call, in the order of the draws."""

    def __init__(self, key: Any, draws: Draws | None) -> None:
        self.key, self.count, self.draws = key, 0, draws

    def next(self) -> Any:
        self.count += 1
        return jax.random.key_data(jax.random.fold_in(self.key, self.count - 1))


class _Streams(threading.local):
    def __init__(self) -> None:
        self.stack: list[Stream | None] = []


_streams = _Streams()
_lock = threading.Lock()
_state = {"seed": 0, "count": 0, "seeded": False}


@contextlib.contextmanager
def drawing_from(
    key: Any, words: bool = False, draws: Draws | None = None
) -> Iterator[Stream | None]:
    """Let draws of this thread come from ``key``; with None they are an error.

    Draws from the caller's generators take their words from ``draws``.
    """
    if key is not None and (words or not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)):
        key = jax.random.wrap_key_data(key)
    stream = None if key is None else Stream(key, draws)
    _streams.stack.append(stream)
    try:
        yield stream
    finally:
        _streams.stack.pop()


@contextlib.contextmanager
def continuing(stream: Stream | None) -> Iterator[None]:
    """Let draws of this thread come from a stream that was there before."""
    _streams.stack.append(stream)
    try:
        yield
    finally:
        _streams.stack.pop()


def seed(value: int) -> None:
    """Seed the device's generator, as ``torch.manual_seed`` does."""
    with _lock:
        _state.update(seed=value & (2**64 - 1), count=0, seeded=True)


def initial_seed() -> int:
    _ensure_seeded()
    return int(_state["seed"])


def _ensure_seeded() -> None:
    if not _state["seeded"]:  # torch's own generators start from its seed too
        seed(torch.initial_seed())


def get_state() -> torch.Tensor:
    """Return seed and counter as the bytes that ``set_state`` takes."""
    _ensure_seeded()
    words = np.array([_state["seed"], _state["count"]], np.uint64)
    return torch.from_numpy(words.view(np.uint8).copy())


def set_state(state: torch.Tensor) -> None:
    words = state.detach().cpu().numpy().copy().view(np.uint64)
    with _lock:
        _state.update(seed=int(words[0]), count=int(words[1]), seeded=True)


def next_words(generator: torch.Generator | None = None) -> Any:
    """Return the words of a key that has not been used: uint32[2]."""
    if generator is not None:
        if _streams.stack:
            stream = _streams.stack[-1]
            if stream is None or stream.draws is None:
                raise SignatureError(_NO_GENERATOR)
            return stream.draws.next(generator)
        if not trace_state_clean():
            raise SignatureError(_NO_GENERATOR)
        return words_of(generator, 1)[0]
    if _streams.stack:
        stream = _streams.stack[-1]
        if stream is None:
            raise SignatureError(_NO_KEY)
        return stream.next()
    if not trace_state_clean():
        raise SignatureError(_NO_KEY)
    _ensure_seeded()
    with _lock:
        count = _state["count"]
        _state["count"] = count + 1
    mixed = seed_of([int(_state["seed"]) & (2**32 - 1), int(_state["seed"]) >> 32, count])
    return np.array([mixed & (2**32 - 1), mixed >> 32], np.uint32)


def next_words_if_any() -> Any:
    """Return ``next_words()``, or None in a traced function without a key."""
    missing = _streams.stack[-1] is None if _streams.stack else not trace_state_clean()
    return None if missing else next_words()


_NO_KEY = (
    "random numbers are drawn in a traced function without a key, which would make them constants "
    "of the program. Pass rng=, a JAX key: torch2jax(fn, lower=True, stochastic=True) and "
    "from_module(module, lower=True) take it."
)


_Generator: Any = torch._C.Generator
_NO_GENERATOR = (
    "random numbers are drawn from a torch.Generator in a traced function, which would make them "
    "constants of the program. Leave generator= out and pass rng=, a JAX key: torch2jax(fn, "
    "lower=True, stochastic=True) and from_module(module, lower=True) take it, and "
    "torchax.interop.jax_jit gives each call a key of its own. device.jit carries generators."
)


def refuse_generators(arguments: Any) -> None:
    """Raise where a generator is among the arguments of a PyTorch function."""
    if any(isinstance(x, _Generator) for x in arguments):
        raise SignatureError(_NO_GENERATOR)


def current() -> Stream | None:
    """Return the keys of the traced call under way on this thread, or None."""
    return _streams.stack[-1] if _streams.stack else None
