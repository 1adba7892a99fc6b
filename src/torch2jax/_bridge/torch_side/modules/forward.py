"""A module's forward pass becomes a function of its variables."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import loans
from .replica import Layout, Replica, Tensor


class Forward:
    """A ``Forward`` is a module's forward pass as a function of its tensors.

    ``from_module`` wraps it. With ``train`` the result is ``(output, buffers as the pass left
    them)``.
    """

    never_differentiated = ("args[0]['frozen']",)
    """Operands whose labels begin so get no gradient work."""

    def __init__(self, layout: Layout, train: bool | None, wrap: Any, keyed: bool) -> None:
        self.layout, self.train, self.wrap = layout, train, wrap
        self.refuses_draws = not keyed
        """Whether drawing random numbers is an error, because no key was passed."""
        self.examples: dict[str, Any] = {}
        """Examples of the arguments, by their labels."""
        self.values: dict[str, Any] = {}
        """The module's own tensors, by their labels, as values for inference."""
        self._pool: list[Replica] = []
        self._lock = threading.Lock()

    def __call__(
        self, variables: dict[str, dict[str, Tensor]], /, *args: Any, **kwargs: Any
    ) -> Any:
        tensors = {**variables["params"], **variables["frozen"]}
        for name, b in variables["buffers"].items():
            tensors[name] = b.clone() if self.train else b

        # No closure: the frames of an error would keep its tensors.
        use = functools.partial(self._use, variables["buffers"], args, kwargs)
        return self.on_replica(tensors, use)

    def _use(
        self,
        buffers: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        replica: Replica,
    ) -> Any:
        out = replica.call(*args, **kwargs)
        return (out, replica.buffers(buffers)) if self.train else out

    def on_replica(self, tensors: Mapping[str, Tensor], use: Callable[[Replica], Any]) -> Any:
        """Return what ``use`` makes of a replica that has these tensors."""
        replica = self._acquire()
        try:
            replica.fill(tensors)
            out = use(replica)
        except BaseException:
            self._give_back(replica)
            raise
        if replica.referenced():
            loans.extend(loans.Loan(lambda: self._give_back(replica)))
        else:
            self._give_back(replica)
        return out

    def _acquire(self) -> Replica:
        with self._lock:
            if self._pool:
                return self._pool.pop()
        # The first one is made under inference, whose modes must see nothing of this.
        with _disable_current_modes(), torch.no_grad():
            return Replica(self.layout, self.train, self.wrap).seal()

    def _give_back(self, replica: Replica) -> None:
        if replica.clear():
            with self._lock:
                self._pool.append(replica)
