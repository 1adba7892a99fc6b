"""The result of a compiled function is taken apart into tensors and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils import _pytree as torch_tree

from ..tensors.tensor import Tensor

__all__ = ["TENSOR", "flatten_result", "unflatten_result"]

TENSOR = object()
"""It stands in the place of a tensor in a tree."""


def flatten_result(result: Any) -> tuple[list[Tensor], Any]:
    leaves, spec = torch_tree.tree_flatten(result)
    outs = [x for x in leaves if isinstance(x, Tensor)]
    rest = [(TENSOR, x.dtype) if isinstance(x, Tensor) else (None, x) for x in leaves]
    return outs, (spec, rest)


def unflatten_result(out: Any, tensors: Sequence[Any]) -> Any:
    spec, rest = out
    made = iter(tensors)
    leaves = [next(made) if mark is TENSOR else x for mark, x in rest]
    return torch_tree.tree_unflatten(leaves, spec)
