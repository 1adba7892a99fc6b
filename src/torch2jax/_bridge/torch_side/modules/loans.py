"""What a call borrows and must give back when its graph is gone. Imports nothing of torch or JAX.

A module's forward pass runs on a replica (see ``_replica``). Where the autograd graph refers to the
replica (``torch.utils.checkpoint`` runs it again in the backward pass), the loan lasts as long as
the graph: to the end of the handler's call, or with a kept graph until that is dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Lease:
    """A loan that is returned once: by ``release``, or when nothing refers to it."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back: Callable[[], None] | None = give_back

    def release(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    __del__ = release


class _Scope(threading.local):
    leases: list[Lease] | None = None


_scope = _Scope()


def scoped(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, at whose end the loans of its calls are returned that no graph has taken over."""

    def call(*args: Any) -> Any:
        outer, _scope.leases = _scope.leases, []
        try:
            return run(*args)
        finally:
            leases, _scope.leases = _scope.leases, outer
            for lease in leases:
                lease.release()

    return call


def hold(lease: Lease) -> None:
    """Keep a loan until the end of the call under way, or of the graph that takes it over."""
    if _scope.leases is not None:
        _scope.leases.append(lease)


def held() -> bool:
    """Whether the call under way has loans that its graph refers to."""
    return bool(_scope.leases)


def take() -> list[Lease]:
    """The loans of the call under way, for a graph that needs them longer."""
    if not _scope.leases:
        return []
    leases, _scope.leases = _scope.leases, []
    return leases
