"""PyTorch's autograd computes gradients in leaves that were made for one call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..._compat.torch import (
    differentiated_further,
    pull_back,
    pull_back_rows,
    transforms_active,
)
from .reachable import reachable_leaves

Tensor = torch.Tensor
Tensors = tuple[Tensor, ...]
Indices = tuple[int, ...]
Dims = tuple["int | None", ...]


def take(items: Sequence[Any], indices: Indices) -> tuple[Any, ...]:
    return tuple(items[i] for i in indices)


def watched_leaves(primals: Tensors, wrt: Indices) -> Tensors:
    """Return primals whose gradients can be asked for, still connected to what they came from."""
    watched = list(primals)
    for i in wrt:
        x = watched[i]
        watched[i] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    return tuple(watched)


@contextlib.contextmanager
def further() -> Iterator[None]:
    """In this scope the gradients of backward passes are differentiated, which some refuse."""
    before = differentiated_further.get()
    differentiated_further.set(True)
    try:
        yield
    finally:
        differentiated_further.set(before)


def leaf_gradients(
    outputs: Tensors,
    inputs: Tensors,
    cotangents: Tensors,
    *,
    create_graph: bool = False,
    batched: bool = False,
) -> Tensors:
    """Return torch's gradients, which are conjugate transposes.

    They are zeros where an output does not depend on an input. With ``batched`` every cotangent has
    leading rows, and so have the results.
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
        x.new_zeros(rows + tuple(x.shape)) if g is None else dense(g)
        for x, g in zip(inputs, grads, strict=True)
    )


def is_cut(g: Tensor) -> bool:
    """Whether a gradient that is not 0 has no graph."""
    if g.requires_grad or torch.compiler.is_compiling():  # there it has no values to look at
        return False
    return bool(g.any())


def check_connected(grads: Tensors) -> None:
    """Raise where gradients that are linear in something watched seem not to depend on it."""
    if any(map(is_cut, grads)):  # those of sparse matrices do so
        raise RuntimeError(
            "PyTorch does not differentiate this function's gradient further: the result of its "
            "backward pass has no graph"
        )


def dense(t: Tensor) -> Tensor:
    """Return a gradient as JAX has it.

    That of an embedding with ``sparse=True`` holds only some rows.
    """
    return t if t.layout is torch.strided else t.to_dense()


class Differentiating:
    """A ``Differentiating`` is a flat function that differentiates, like the forces of an energy.

    It runs as PyTorch's users run it: gradients are on, and its operands require them. ``known``
    says that it is such a function; otherwise its first call shows that.
    """

    def __init__(self, f: Callable[..., Any], known: bool) -> None:
        self.f, self.known = f, known

    def __call__(self, *args: Tensor) -> Any:
        if not self.known:
            try:
                return self.f(*args)
            except RuntimeError as error:
                if not needs_gradients(error):
                    raise
                self.known = True
        if transforms_active():  # there a tensor cannot be made to require gradients
            return self.f(*args)
        before = torch.is_grad_enabled()
        with torch.enable_grad():
            out = self.f(*map(_requiring, args))
        if before or type(out) is not tuple:
            return out
        return tuple(y.detach() for y in out)


def needs_gradients(error: Exception) -> bool:
    """Return whether a function asked for gradients where they were off."""
    return isinstance(error, RuntimeError) and "not require grad" in str(error)


def _requiring(x: Tensor) -> Tensor:
    inexact = x.is_floating_point() or x.is_complex()
    return x if x.requires_grad or not inexact else x.detach().requires_grad_()


class _DenseLookups(TorchFunctionMode):
    """Embeddings and ``gather`` get dense gradients, whatever their argument ``sparse`` says."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        at = _SPARSE.get(func)
        if at is not None:
            args = tuple(False if i == at else x for i, x in enumerate(args))
            kwargs = {
                k: False if k in ("sparse", "sparse_grad") else x for k, x in (kwargs or {}).items()
            }
        return func(*args, **(kwargs or {}))


_SPARSE: dict[Any, int] = {
    torch.embedding: 4,
    torch.embedding_bag: 5,
    torch.nn.functional.embedding: 6,
    torch.nn.functional.embedding_bag: 7,
    torch.gather: -1,
    torch.Tensor.gather: -1,
}
"""Their argument ``sparse`` stands there; -1 says that it is a keyword."""


def with_dense_gradients(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``fn`` without sparse gradients of embeddings and ``gather``.

    JAX's gradients are dense, and PyTorch loses further derivatives where it reads the values of
    a sparse tensor.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        with _DenseLookups():
            return fn(*args, **kwargs)

    return call


def refuses_grad(error: RuntimeError) -> bool:
    """Return whether a graph refuses ``autograd.grad``; ``checkpoint(use_reentrant=True)`` does."""
    return "use_reentrant=True" in str(error) or "Checkpointing is not compatible" in str(error)


def gradients_by_backward(
    outputs: Sequence[Any], leaves: Tensors, cotangents: Tensors, roots: Iterable[Any]
) -> Tensors:
    """Return gradients by ``backward()``, for graphs that refuse ``autograd.grad``.

    ``backward()`` adds to ``.grad`` of every leaf, so those of the user's tensors are put back.
    """
    parameters = reachable_leaves(roots)
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        torch.autograd.backward(outputs, cotangents)  # type: ignore[arg-type]
        return tuple(torch.zeros_like(x) if x.grad is None else dense(x.grad) for x in leaves)
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad


def conj(tensors: Tensors) -> Tensors:
    for t in tensors:
        if t.is_complex():
            return tuple(t.conj() if t.is_complex() else t for t in tensors)
    return tensors
