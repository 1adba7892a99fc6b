"""The way of an operator is found once: a lowering, a decomposition, or the bridge."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ...lowerings.registry import lowering_of
from .operands import Slot

__all__ = ["Route"]


aten = torch.ops.aten
_FILLS = (aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default)
"""Only these operators may write to an element twice, because they write one value everywhere."""


class Route:
    """A route is the way of an operator, and all that its schema says.

    ``target`` is the operator that is computed. Where ``func`` writes to its arguments, ``target``
    is the operator of the same meaning that does not, without the arguments ``drop``; ``pure`` says
    that there is one. ``kind`` is "native", "decomposed" or "bridge". ``lowered`` is the lowering,
    and ``decomposition`` is the function of tensors.
    """

    def __init__(self, func: Any) -> None:
        self.func = func
        schema = func._schema
        self.names = [a.name for a in schema.arguments]
        written = [
            a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
        ]
        self.mutable = [a.name for a in written]
        self.generator = self.names.index("generator") if "generator" in self.names else None
        outs = [a.name for a in written if a.is_out]
        self.to_outs = bool(outs)
        self.writes_several = len(written) > 1 or any("List" in str(a.type) for a in written)
        returns = schema.returns  # PyTorch makes this list anew each time it is asked
        self.returns = len(returns)
        self.returns_mutated = bool(returns) and all(r.alias_info is not None for r in returns)
        self.target: Any = func
        self.drop: tuple[str, ...] = ()
        if self.mutable:
            functional = _functional_of(func, outs)
            if functional is not None:
                self.target, self.drop = functional, tuple(outs)
        self.pure = self.target is not func or not self.mutable
        self.fills = func in _FILLS
        self.kind: str
        self.lowered: Any = None
        self.decomposition: Any = None
        self.kind, found = _find(self.target)
        if self.kind == "native":
            self.lowered = found
        else:
            self.decomposition = found
        which = self.lowered.scalars if self.lowered is not None else False
        self.scalars = [which if type(which) is bool else n in which for n in self.names]
        """For each argument it says whether numbers in it are operands."""
        self.random = self.lowered is not None and self.lowered.random
        # A result that is a Python value is read from tensors, so there is nothing to compile.
        self.returns_values = self.kind == "decomposed" and any(
            "Tensor" not in str(r.type) for r in returns
        )

    def scalar(self, name: str) -> bool:
        return self.scalars[self.names.index(name)]

    def bridged(self) -> Route:
        """Return a route of the same operator by PyTorch's own kernel."""
        other = copy.copy(self)
        other.kind, other.decomposition, other.returns_values = "bridge", None, False
        return other

    def written(self, args: Any, kwargs: Any) -> list[int]:
        """Return the operands that are written to, by the template of the arguments."""
        found: list[int] = []
        for name in self.mutable:
            i = self.names.index(name)
            x = kwargs.get(name) if name in kwargs else (args[i] if i < len(args) else None)
            found += [s.index for s in (x if isinstance(x, list) else [x]) if type(s) is Slot]
        return found


def _functional_of(func: Any, outs: Sequence[str]) -> Any:
    """Return the operator of the same meaning that writes to nothing, or None."""
    namespace, _, name = func._schema.name.partition("::")
    space = getattr(torch.ops, namespace)
    arguments = [a for a in func._schema.arguments if a.name not in outs]
    name = name if outs else name.removesuffix("_")
    if not outs and name == func._schema.name.partition("::")[2]:
        return None
    for candidate in (name, f"{name}_functional", f"{name}_copy"):
        packet = getattr(space, candidate, None)
        for which in packet.overloads() if packet is not None else ():
            other = getattr(packet, which)
            if any(a.alias_info is not None for a in other._schema.arguments):
                continue
            theirs = other._schema.arguments
            if [(a.name, str(a.type)) for a in theirs] == [
                (a.name, str(a.type)) for a in arguments
            ]:
                return other
    return None


def _find(func: Any) -> tuple[str, Any]:
    lowered = lowering_of(func)
    if lowered is not None:
        return "native", lowered
    if hasattr(func, "impl_aten") and func.namespace == "prims":
        return "decomposed", func.impl_aten
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch._decomp import decomposition_table
    if func in decomposition_table:
        return "decomposed", decomposition_table[func]
    if func._can_decompose():
        return "decomposed", func.decompose
    name, explicit = func.name(), "CompositeExplicitAutograd"
    if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(name, explicit):
        key = torch._C.DispatchKey.CompositeExplicitAutograd
        return "decomposed", lambda *a, **k: func._op_dk(key, *a, **k)
    return "bridge", None
