"""The table of operators that are more than a function of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..operator import Operator

SPECIAL: dict[Any, Callable[..., Any]] = {}
"""Operators that are more than a function of arrays: they take and return tensors."""


def special(*ops: Any) -> Callable[[Any], Any]:
    """Register a handler ``(args, kwargs) -> result`` of operators."""

    def register(fn: Any) -> Any:
        SPECIAL.update((op, fn) for op in ops if op is not None)
        return fn

    return register


aten = torch.ops.aten


def ordinary_way(func: Any) -> Any:
    """The ordinary way of an operator that also has a handler."""
    op: list[Any] = []

    def call(args: Any, kwargs: Any) -> Any:
        if not op:
            op.append(Operator(func))
        return op[0](args, kwargs)

    return call
