"""Gradients by PyTorch's autograd, in leaves that were made for one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..._compat.torch import pull_back, pull_back_rows
from .reachable import reachable_leaves

Tensor = torch.Tensor
Tensors = tuple[Tensor, ...]
Indices = tuple[int, ...]
Dims = tuple["int | None", ...]


def take(items: Sequence[Any], indices: Indices) -> tuple[Any, ...]:
    return tuple(items[i] for i in indices)


def watched_leaves(primals: Tensors, wrt: Indices) -> Tensors:
    """Primals whose gradients can be asked for, still connected to what they came from."""
    watched = list(primals)
    for i in wrt:
        x = watched[i]
        watched[i] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    return tuple(watched)


def leaf_gradients(
    outputs: Tensors,
    inputs: Tensors,
    cotangents: Tensors,
    *,
    create_graph: bool = False,
    batched: bool = False,
) -> Tensors:
    """torch's gradients (conjugate transposes); zeros where an output does not depend on an input.

    ``batched``: every cotangent has leading rows, and so have the results.
    """
    connected = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(inputs)
    if connected:
        outs, cots = zip(*connected, strict=True)
        if batched:
            grads = pull_back_rows(outs, inputs, cots, create_graph)
        else:
            grads = pull_back(outs, inputs, cots, create_graph, create_graph)
    rows = (cotangents[0].shape[0],) if batched else ()
    return tuple(
        x.new_zeros(rows + tuple(x.shape)) if g is None else g
        for x, g in zip(inputs, grads, strict=True)
    )


def refuses_grad(error: RuntimeError) -> bool:
    """Whether a graph refuses ``autograd.grad``: ``checkpoint(use_reentrant=True)`` does."""
    return "use_reentrant=True" in str(error) or "Checkpointing is not compatible" in str(error)


def gradients_by_backward(
    outputs: Sequence[Any], leaves: Tensors, cotangents: Tensors, roots: Iterable[Any]
) -> Tensors:
    """Gradients by ``backward()``, for graphs that refuse ``autograd.grad``.

    ``backward()`` adds to ``.grad`` of every leaf: those of the user's tensors are put back.
    """
    parameters = reachable_leaves(roots)
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        torch.autograd.backward(outputs, cotangents)  # type: ignore[arg-type]
        return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad


def conj(tensors: Tensors) -> Tensors:
    for t in tensors:
        if t.is_complex():
            return tuple(t.conj() if t.is_complex() else t for t in tensors)
    return tensors
