"""``Module.to("jax")`` and back: parameters that are one stay one.

PyTorch moves a parameter by ``param.data = moved`` where both are of one kind, as for CUDA. Where
not, as here, each module makes a new parameter of its own, and what was tied is two.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from ..tensors.tensor import Tensor

__all__ = ["keep_ties"]


class _Moves(threading.local):
    """While a module is converted on this thread: the new parameter of each old one."""

    def __init__(self) -> None:
        self.depth = 0
        self.made: dict[torch.Tensor, torch.nn.Parameter] = {}


_moves = _Moves()


def keep_ties() -> None:
    """Let ``Module._apply`` make one parameter of one, where it goes to device jax or comes back.

    What does not touch device jax is converted as before.
    """
    convert: Callable[..., Any] = torch.nn.Module._apply

    @functools.wraps(convert)
    def apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> Any:
        before = dict(self._parameters)
        _moves.depth += 1  # a module converts its parts by this method
        try:
            result = convert(self, fn, recurse)
            for name, old in before.items():
                new = self._parameters[name]
                if old is None or new is None or new is old:
                    continue
                if type(old) is Tensor or type(new) is Tensor:
                    self._parameters[name] = _moves.made.setdefault(old, new)
            return result
        finally:
            _moves.depth -= 1
            if not _moves.depth:
                _moves.made.clear()

    torch.nn.Module._apply = apply
