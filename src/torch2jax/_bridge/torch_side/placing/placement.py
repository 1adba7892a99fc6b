"""Calls with large results compute them where they belong. This file imports torch, never JAX.

A call computes its results in memory of PyTorch's, and the handler copies them. Where they are
large, the copy takes longer than many an operator. So the handler gives such a call the buffers of
its results. The first call with results of a size shows which operators make them; later calls have
these operators write into the buffers. The handler compares addresses, so that a result elsewhere
is copied as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...._compat.torch import pop_mode, push_mode
from .keepers import give_memory
from .makers import Redirect, Step, Watch, is_plain

Tensor = torch.Tensor

LARGE = 2**20
"""Bytes. Smaller results are copied, as that takes less time than to look at operators."""

_MOST_SIZES = 16
_MOST_DOUBTS = 16
_MOST_MISSES = 4


class _Plan:
    """A plan says how calls with results of certain sizes compute them."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        self.made: list[StorageWeakRef] = []
        """Results that were PyTorch's own. While they are there, a call or somebody has them."""
        self.doubts = 0
        self.misses = 0

    def note(self, results: Sequence[Tensor]) -> None:
        self.made = [StorageWeakRef(results[step.result].untyped_storage()) for step in self.steps]


_WATCHED = _Plan(())
"""This plan stands for the one that a call under way makes."""


class Placement:
    """A placement runs a function's calls that have large results."""

    def __init__(self, run: Callable[..., Any], collect: Any, operands: int) -> None:
        self._run, self._collect, self._operands = run, collect, operands
        self._plans: dict[int, _Plan | None] = {}
        """By the sizes of results. None leaves calls alone."""
        self._over = False
        """Whether the function has kept a result."""

    def __call__(self, *given: Any) -> tuple[Any, ...] | None:
        """Return the results for operands; None leaves the call alone.

        After the operands it takes the buffers, and a number that stands for their sizes.
        """
        if self._over:
            return None
        operands, buffers, sizes = given[: self._operands], given[self._operands : -1], given[-1]
        if sizes not in self._plans:
            return self._watched(sizes, operands, buffers)
        plan = self._plans[sizes]
        if plan is None:
            return None
        if plan.made or plan is _WATCHED:
            if plan is _WATCHED or not all(made.expired() for made in plan.made):
                return self._doubted(sizes, plan, operands)
            plan.made = []
        redirect = Redirect(plan.steps, buffers)
        push_mode(redirect)
        try:
            results = self._results(operands)
        except BaseException:
            self._missed(sizes, plan)
            raise
        finally:
            pop_mode(redirect)
        if all(_is_at(results, step.result, buffers) for step in plan.steps):
            plan.misses = 0
        else:
            self._missed(sizes, plan)
        return results

    def settle(self, storages: list[Any]) -> None:
        """Give those memory of their own who keep tensors of these storages beyond a call."""
        for storage in storages:
            if not give_memory(storage):
                self._over = True

    def _watched(self, sizes: int, operands: Any, buffers: Any) -> tuple[Any, ...] | None:
        if len(self._plans) >= _MOST_SIZES:
            return None
        self._plans[sizes] = _WATCHED
        plan = None
        watch = Watch(frozenset(b.nbytes for b in buffers if b.nbytes >= LARGE))
        push_mode(watch)
        try:
            results = self._results(operands)
            steps = watch.steps(results)
            if pays([results[step.result].nbytes for step in steps], watch.operators):
                plan = _Plan(steps)
                plan.note(results)
        finally:
            pop_mode(watch)
            self._plans[sizes] = plan
        return results

    def _results(self, operands: Any) -> tuple[Any, ...]:
        out = self._run(*operands)
        if type(out) is tuple:
            return out
        if self._collect is None:
            return (out,) if isinstance(out, Tensor) else tuple(out)
        return self._collect(out)

    def _doubted(self, sizes: int, plan: _Plan, operands: Any) -> Any:
        """Run a call while a call before has its results, or somebody keeps them."""
        results = self._results(operands)
        if plan is not _WATCHED:
            plan.doubts += 1
            plan.note(results)
            if plan.doubts >= _MOST_DOUBTS:
                self._plans[sizes] = None
        return results

    def _missed(self, sizes: int, plan: _Plan) -> None:
        plan.misses += 1
        if plan.misses >= _MOST_MISSES:
            self._plans[sizes] = None


def _is_at(results: Any, i: int, buffers: Sequence[Tensor]) -> bool:
    return (
        i < len(results) and is_plain(results[i]) and results[i].data_ptr() == buffers[i].data_ptr()
    )


def pays(sizes: Sequence[int], operators: int) -> bool:
    """Return whether results of so many bytes cost more to copy than so many operators to watch.

    With cold caches a watched operator takes 7 µs more, and the call itself 20. A copy takes 35 µs
    a MB. Blocks of 32 MB are mapped anew each time, and their pages take ten times that.
    """
    saved = sum(s * (35 if s < 2**25 else 400) for s in sizes) / 1e6
    return saved > 1.25 * (20 + 7 * operators)
