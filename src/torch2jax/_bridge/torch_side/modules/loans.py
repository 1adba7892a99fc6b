"""A call gives back what it borrows when its graph is gone.

This file imports nothing of torch or JAX. A module's forward pass runs on a replica (see
``replica.py``). Where the autograd graph refers to the replica (``torch.utils.checkpoint`` runs it
again in the backward pass), the loan lasts as long as the graph: to the end of the handler's call,
or with a kept graph until that is dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Loan:
    """A loan is returned once: by ``release``, or when nothing refers to it."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back: Callable[[], None] | None = give_back

    def release(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    __del__ = release


class _Scope(threading.local):
    loans: list[Loan] | None = None


_scope = _Scope()


def scoped(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run``; at its end the loans are returned that no graph has taken over."""

    def call(*args: Any, **kwargs: Any) -> Any:
        outer, _scope.loans = _scope.loans, []
        try:
            return run(*args, **kwargs)
        finally:
            loans, _scope.loans = _scope.loans, outer
            for loan in loans:
                loan.release()

    return call


def extend(loan: Loan) -> None:
    """Keep a loan until the end of the call under way, or of the graph that takes it over."""
    if _scope.loans is not None:
        _scope.loans.append(loan)


def outstanding() -> bool:
    """Return whether the call under way has loans that its graph refers to."""
    return bool(_scope.loans)


def take_over() -> list[Loan]:
    """Return the loans of the call under way, for a graph that needs them longer."""
    if not _scope.loans:
        return []
    loans, _scope.loans = _scope.loans, []
    return loans
