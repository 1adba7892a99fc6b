"""A compiled function gives results, taken apart into tensors and the rest, and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as torch_tree

from ..tensors.tensor import Tensor

__all__ = ["TENSOR", "add_gradient", "flatten_result", "unflatten_result"]

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


def add_gradient(x: torch.Tensor, gradient: torch.Tensor) -> None:
    """Give a leaf the gradient of a compiled backward pass, as ``backward()`` does."""
    with torch.no_grad():
        x.grad = gradient if x.grad is None else x.grad.add_(gradient)
