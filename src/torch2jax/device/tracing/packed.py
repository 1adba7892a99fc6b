"""Arguments and results of a call are trees of tensors, and of values that stay the same."""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as torch_tree

__all__ = ["NotBridged", "Packed"]


class NotBridged(Exception):
    """A call cannot go through the bridge."""

    lacks_values = False
    """Whether it might with the values of its operands."""


class _Mark(enum.Enum):
    TENSOR = "a tensor"


@dataclasses.dataclass(frozen=True)
class Packed:
    """A tree without its tensors: dataclasses are trees too, whoever has registered them."""

    spec: Any
    leaves: tuple[Any, ...]
    kind: type | None = None
    """The dataclass whose attributes these are."""

    @staticmethod
    def of(tree: Any, tensors: list[torch.Tensor], what: str, kind: Any = None) -> Packed:
        """Pack a tree; its tensors go into a list."""
        leaves, spec = torch_tree.tree_flatten(tree, is_leaf=lambda x: type(x) is torch.Size)
        packed: list[Any] = []
        for x in leaves:
            if isinstance(x, torch.Tensor):
                tensors.append(x)
                packed.append(_Mark.TENSOR)
            elif dataclasses.is_dataclass(x) and not isinstance(x, type) and hasattr(x, "__dict__"):
                packed.append(Packed.of(dict(vars(x)), tensors, what, type(x)))
            elif isinstance(x, torch.device):
                packed.append(torch.device("cpu") if x.type in ("jax", "lazy") else x)
            elif isinstance(x, _PLAIN):
                packed.append(x)
            else:
                raise NotBridged(f"{what} a {type(x).__name__}, which is no tree of tensors.")
        return Packed(spec, tuple(packed), kind)

    def unpacked(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Return the tree with these tensors."""
        return self._unpacked(iter(tensors))

    def _unpacked(self, tensors: Any) -> Any:
        leaves = [
            next(tensors)
            if x is _Mark.TENSOR
            else x._unpacked(tensors)
            if isinstance(x, Packed)
            else x
            for x in self.leaves
        ]
        tree = torch_tree.tree_unflatten(leaves, self.spec)
        if self.kind is None:
            return tree
        new = object.__new__(self.kind)
        vars(new).update(tree)
        return new


_PLAIN = (
    types.NoneType, bool, int, float, complex, str, bytes, np.generic, enum.Enum, slice, range,
    type, types.FunctionType, types.BuiltinFunctionType, torch.dtype, torch.layout,
    torch.memory_format, torch.Size, types.EllipsisType,
)  # fmt: skip
"""Values of these types are the same in each call."""
