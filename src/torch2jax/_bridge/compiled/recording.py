"""Each operator of a traced program passes here first. This file imports torch, never JAX."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..._errors import SignatureError, Torch2JaxError
from ..torch_side.answers import line_of_the_user
from ..torch_side.recorder import draws
from .drawing import DRAWS, Draws

Tensor = torch.Tensor


class NotCompiled(Torch2JaxError):
    """A function cannot be compiled; the message says why, and where in its code."""


class Calls(TorchDispatchMode):
    """It lets operators draw from a key, and refuses writes into tensors that are no operands.

    ``functional`` wraps a tensor so that writes become results, and ``written`` tells whether one
    was. Without ``words``, those of a key, an operator that draws raises.
    """

    def __init__(
        self,
        label: str,
        words: Tensor | None,
        functional: Callable[[Any], Any],
        written: Callable[[object], bool],
    ) -> None:
        super().__init__()
        self._label = label
        self._draws = None if words is None else Draws(words)
        self._functional, self._written = functional, written
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        """Tensors of the user's with their wrappers; they are kept, so that ids stay theirs."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _CHECKS:
            return None
        args, kwargs = tree_map(self._hold, (args, kwargs or {}))
        out = self._call(func, args, kwargs)
        if func._schema.is_mutable:
            self._refuse_writes(func)
        return out

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        draw = DRAWS.get(func)
        if draw is None:
            with self:  # what it is made of may draw
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
            if not draws(func._schema, args, kwargs):
                return func(*args, **kwargs)
        if self._draws is None:
            raise SignatureError(
                f"{self._label} draws random numbers ({func}): with compiled=True they come from a "
                "key alone. Wrap it with stochastic=True and pass rng= (apply(..., rng=) for a "
                "module)."
            )
        if draw is None:
            raise SignatureError(
                f"{self._label} draws random numbers by {func}, which compiled=True does not know; "
                "leave compiled=True out."
            )
        return draw(self._draws, *args, **kwargs)

    def _hold(self, x: Any) -> Any:
        if type(x) not in (Tensor, torch.nn.Parameter):
            return x
        if id(x) not in self._held:
            self._held[id(x)] = x, self._functional(x)
        return self._held[id(x)][1]

    def _refuse_writes(self, func: Any) -> None:
        if any(self._written(held) for _, held in self._held.values()):
            line = line_of_the_user(sys._getframe(1))
            raise NotCompiled(
                f"{self._label} cannot be compiled. It changes a tensor that is not among its "
                f"arguments, by {func}{f': {line}' if line else ''}\nPass it as an argument and "
                "return its new value (from_module does so for buffers), or leave compiled=True "
                "out."
            )


_aten: Any = torch.ops.aten
_CHECKS = (
    _aten._linalg_check_errors.default,
    _aten._assert_async.default,
    _aten._assert_async.msg,
)
"""A graph leaves these out: a singular matrix gives what JAX gives there, inf or NaN."""
