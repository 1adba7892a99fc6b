"""``torch.autograd.Function`` under ``lower=True``: its own backward pass, as JAX's derivative.

JAX differentiates what the forward pass did, operator by operator; a function with a derivative of
its own (a straight-through estimator) must keep that. So ``apply`` becomes a ``jax.custom_vjp``,
whose backward pass runs the forward pass again under PyTorch's autograd, on tracers, and its
backward.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import torch
from jax.core import Tracer
from torch.utils import _pytree as torch_tree
from torch.utils.checkpoint import CheckpointFunction

from ..._compat.torch import custom_function_base
from .. import random_streams
from ..operators.constants import value_of
from ..setup.changes_of_pytorch import custom_apply
from ..tensors.tensor import Tensor, wrap

__all__ = ["differentiable_by_jax"]


class _Active(threading.local):
    depth = 0


_active = _Active()


@contextlib.contextmanager
def differentiable_by_jax() -> Iterator[None]:
    """In this scope ``apply`` of autograd functions is ours, for this thread.

    Other threads go past ours to PyTorch's.
    """
    with custom_apply(_apply):
        _active.depth += 1
        try:
            yield
        finally:
            _active.depth -= 1


def _plain(cls: Any, *args: Any, **kwargs: Any) -> Any:
    return super(custom_function_base, cls).apply(*args, **kwargs)


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    if not _active.depth:
        return _plain(cls, *args, **kwargs)
    if cls is CheckpointFunction:  # JAX decides what to keep for its derivative
        run_function, _, *rest = args
        return run_function(*rest)
    leaves, spec = torch_tree.tree_flatten((args, kwargs))
    places = [
        i for i, x in enumerate(leaves) if type(x) is Tensor and isinstance(x._cell.array, Tracer)
    ]
    if not any(leaves[i].is_floating_point() or leaves[i].is_complex() for i in places):
        return _plain(cls, *args, **kwargs)
    if any(leaves[i].requires_grad for i in places):
        return _plain(cls, *args, **kwargs)  # PyTorch's own autograd is at work here
    dtypes = [leaves[i].dtype for i in places]
    structure: list[Any] = []
    stream = random_streams.current()
    start = stream.count if stream is not None else 0

    def run(arrays: Any, requires_grad: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and outputs of the function on these arrays."""
        tensors = [wrap(a, d) for a, d in zip(arrays, dtypes, strict=True)]
        if requires_grad:
            for t in tensors:
                t.requires_grad_(t.is_floating_point() or t.is_complex())
        full = list(leaves)
        for i, t in zip(places, tensors, strict=True):
            full[i] = t
        a, k = torch_tree.tree_unflatten(full, spec)
        if stream is not None:
            stream.count = start  # the same draws in every run
        depth, _active.depth = _active.depth, 0
        try:
            with torch.enable_grad():
                out = _plain(cls, *a, **k)
        finally:
            _active.depth = depth
        outs, out_spec = torch_tree.tree_flatten(out)
        structure[:] = [out_spec, outs]
        return tensors, [x for x in outs if isinstance(x, Tensor)]

    @jax.custom_vjp
    def call(*arrays: Any) -> list[Any]:
        return [value_of(x) for x in run(arrays, False)[1]]

    def forward(*arrays: Any) -> Any:
        return call(*arrays), arrays

    def backward(arrays: Any, cotangents: Any) -> Any:
        inputs, outs = run(arrays, True)
        pairs = [
            (x, wrap(ct, x.dtype))
            for x, ct in zip(outs, cotangents, strict=True)
            if x.requires_grad
        ]
        wanted = [x for x in inputs if x.requires_grad]
        found: list[Any] = [None] * len(wanted)
        if pairs and wanted:
            found = list(
                torch.autograd.grad(
                    [x for x, _ in pairs],
                    wanted,
                    [ct.conj() for _, ct in pairs],
                    create_graph=True,
                    allow_unused=True,
                )
            )
        gradients = []
        for x, a in zip(inputs, arrays, strict=True):
            if not x.requires_grad:
                gradients.append(None)
                continue
            g = found.pop(0)
            # PyTorch's gradients of complex values are the conjugates of JAX's.
            gradients.append(
                jax.numpy.zeros_like(a)
                if g is None
                else jax.numpy.conj(value_of(g)).astype(a.dtype)
            )
        return tuple(gradients)

    call.defvjp(forward, backward)
    results = call(*[value_of(leaves[i]) for i in places])
    out_spec, outs = structure
    made = iter(results)
    return torch_tree.tree_unflatten(
        [wrap(next(made), x.dtype) if isinstance(x, Tensor) else x for x in outs], out_spec
    )
