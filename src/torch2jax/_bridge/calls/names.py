"""A function has one name in messages and another in HLO."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch.overrides import resolve_name

from ..torch_side.modules.forward import Forward


def label_of(fn: Any) -> str:
    """Return what messages call ``fn``."""
    if isinstance(fn, Forward):
        return type(fn.layout.module).__qualname__
    if isinstance(fn, functools.partial):
        return label_of(fn.func)
    if isinstance(fn, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(fn)
    if isinstance(fn, types.BuiltinFunctionType):
        return resolve_name(fn) or fn.__name__
    return getattr(fn, "__qualname__", None) or type(fn).__qualname__


def qualified_name(fn: Any) -> str:
    """Return ``module.qualname``, the root of the name in HLO."""
    label = label_of(fn)
    inner = fn.func if isinstance(fn, functools.partial) else fn
    inner = fn.layout.module if isinstance(fn, Forward) else inner
    if not hasattr(inner, "__qualname__"):
        inner = type(inner)
    module = getattr(inner, "__module__", None)
    return label if module is None or label.startswith(f"{module}.") else f"{module}.{label}"
