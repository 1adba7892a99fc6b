"""This package has conversions and operators under torchax's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import jaten, jc10d, jlibrary, jtorch, mappings, ops_registry

__all__ = ["all_aten_jax_ops", "jaten", "jc10d", "jlibrary", "jtorch", "mappings", "ops_registry"]


def all_aten_jax_ops() -> dict[Any, Callable[..., Any]]:
    """Return the function of arrays of each operator that has one."""
    found = ops_registry.all_aten_ops.items()
    return {key: operator.func for key, operator in found if operator.is_jax_function}
