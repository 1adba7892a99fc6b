"""A key seeds torch's random generators for one call. This file imports torch, never JAX.

A seeded program has one more operand, the words of a JAX key (uint32). The same words give the same
numbers, so a forward pass that runs again draws the same mask. The process has one CPU generator,
so a call that seeds it holds ``lock``, and puts its state back.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from ..._compat.torch import outside_transforms
from .words import words_of

Tensor = torch.Tensor
Tensors = tuple[Tensor, ...]

lock = threading.RLock()

_MASK = 2**64 - 1


def seeded(fn: Callable[..., Tensors], at: int) -> Callable[..., Tensors]:
    """Return ``fn`` with the words of a key as operand ``at``, which seed the generators."""

    def run(*operands: Tensor) -> Tensors:
        words = operands[at]
        others = operands[:at] + operands[at + 1 :]
        if type(words) is not Tensor:  # a fake tensor has no value
            return fn(*others)
        with _generators_from(words):
            return fn(*others)

    return run


def draw_seed() -> Tensors:
    """Draw two words from torch's own CPU generator, for a call without a key."""
    with lock:
        words = torch.randint(0, 2**32, (2,), dtype=torch.int64)
    return (words.to(torch.uint32),)


def refusing(fn: Callable[..., Tensors], label: str) -> Callable[..., Tensors]:
    """Return ``fn``, which raises where it draws: a derivative must draw from a key."""

    def run(*operands: Tensor) -> Tensors:
        if torch._C._len_torch_dispatch_stack():  # in a fake run the generators stand still
            return fn(*operands)
        with lock:
            generators = _generators(operands)
            before = _states(generators)
            out = fn(*operands)
            drew = before != _states(generators)
        if drew:
            raise RuntimeError(
                f"{label} draws random numbers, and output_shapes= kept that from being seen when "
                "it was traced; its derivatives would use other numbers than its results. Wrap it "
                "with stochastic=True and pass rng=, or leave output_shapes out."
            )
        return out

    return run


def _generators(tensors: Iterable[Tensor]) -> list[torch.Generator]:
    """Return the generator of the CPU, and those of the GPUs on which the tensors are."""
    gpus = {x.device.index or 0 for x in tensors if x.device.type == "cuda"}
    return [torch.default_generator, *(torch.cuda.default_generators[i] for i in sorted(gpus))]


def _states(generators: Iterable[torch.Generator]) -> list[bytes]:
    with outside_transforms():  # a GPU's generator is on the host, too, so nothing waits for it
        return [g.get_state().numpy().tobytes() for g in generators]


@contextlib.contextmanager
def _generators_from(words: Tensor) -> Iterator[None]:
    seed = seed_of(words_of(words))
    generators = _generators((words,))
    with lock:
        states = [g.get_state() for g in generators]
        try:
            for g in generators:
                g.manual_seed(seed)
            yield
        finally:
            for g, state in zip(generators, states, strict=True):
                g.set_state(state)


def seed_of(words: Sequence[int]) -> int:
    """Return a 64-bit seed, in each bit of which every word has a part.

    It runs one round per word of the finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable
    pseudorandom number generators, 2014), because torch's CPU generator uses the low half of a seed
    alone.
    """
    seed = 0
    for word in words:
        seed = (seed + word + 0x9E3779B97F4A7C15) & _MASK
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & _MASK
        seed ^= seed >> 31
    return seed
