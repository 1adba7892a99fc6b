"""The table has the operators that are more than a function of arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..operator import Operator

SPECIAL: dict[Any, Callable[..., Any]] = {}
"""Handlers of operators that are more than a function of arrays; they take and return tensors."""


def special(*ops: Any) -> Callable[[Any], Any]:
    """Register a handler ``(args, kwargs) -> result`` for operators."""

    def register(fn: Any) -> Any:
        SPECIAL.update((op, fn) for op in ops if op is not None)
        return fn

    return register


aten = torch.ops.aten


def ordinary_way(func: Any) -> Any:
    """Return the ordinary way of an operator that also has a handler."""
    op = functools.cache(lambda: Operator(func))  # made when first called: lowerings may come later
    return lambda args, kwargs: op()(args, kwargs)
