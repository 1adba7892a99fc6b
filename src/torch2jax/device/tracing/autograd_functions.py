"""The backward pass of a ``torch.autograd.Function`` becomes JAX's derivative in a trace.

Under ``lower=True`` JAX differentiates what the forward pass did, operator by operator. A function
with a derivative of its own (a straight-through estimator) must keep that. So ``apply`` becomes a
``jax.custom_vjp``. Its backward pass runs the forward pass again under PyTorch's autograd, on
tracers, and then PyTorch's backward pass.
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
from ..setup.changes_of_pytorch import replace_while_tracing, replacing
from ..tensors.tensor import Tensor, become, recorded, wrap, write
from ..thread_state import state

__all__ = ["differentiable_by_jax"]


class _Active(threading.local):
    depth = 0


_active = _Active()


@contextlib.contextmanager
def differentiable_by_jax() -> Iterator[None]:
    """In this scope ``apply`` of autograd functions is ours, for this thread.

    PyTorch's ``apply`` in Python calls one in C++, which it finds through a base class. During a
    trace it finds ours first, even where ``apply`` was looked up earlier.
    """
    _active.depth += 1
    try:
        with replacing():
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
    function = _Differentiated(cls, leaves, spec, places)
    arrays = [value_of(leaves[i]) for i in places]
    if not any(recorded(leaves[i]) for i in places):
        return function.outputs(function.call(*arrays), [leaves[i] for i in places])
    # PyTorch's own autograd is at work here. Its graph gets values that have JAX's derivative.
    out = _plain(cls, *args, **kwargs)
    made = [x for x in torch_tree.tree_leaves(out) if isinstance(x, Tensor)]
    after = function.stream.count if function.stream is not None else 0
    given = {id(leaves[i]._cell) for i in places}
    for x, result in zip(made, function.call(*arrays), strict=True):
        if any(x is leaves[i] for i in places) or id(x._cell) not in given:
            write(x, result)
        else:
            become(x, wrap(result, x.dtype))
    if function.stream is not None:
        function.stream.count = after
    return out


class _Differentiated:
    """One call of a user's function is ``call(*arrays)``, with its own derivative for JAX."""

    def __init__(self, cls: Any, leaves: list[Any], spec: Any, places: list[int]) -> None:
        self.cls, self.spec, self.places = cls, spec, places
        # It keeps no tensor of the trace, because JAX keeps this object as long as the program.
        self.leaves = [None if i in places else x for i, x in enumerate(leaves)]
        self.dtypes = [leaves[i].dtype for i in places]
        self.stream = random_streams.current()
        self.start = self.stream.count if self.stream is not None else 0
        self.resume = state.resume
        self.outs: list[Any] = []
        """The outputs, with a mark and the dtype in the place of each tensor."""
        self.out_spec: Any = None
        self.written: dict[int, int] = {}
        """Which input an output is (``mark_dirty``), by their places among the tensors."""
        self.call = jax.custom_vjp(self._call)
        self.call.defvjp(lambda *arrays: (self.call(*arrays), arrays), self._backward)

    def _call(self, *arrays: Any) -> list[Any]:
        return [value_of(x) for x in self._run(arrays, False)[1]]

    def _run(self, arrays: Any, requires_grad: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Return inputs and outputs of the function on these arrays."""
        with self.resume():
            tensors = [wrap(a, d) for a, d in zip(arrays, self.dtypes, strict=True)]
            given = tensors
            if requires_grad:
                for t in tensors:
                    t.requires_grad_(t.is_floating_point() or t.is_complex())
                if self.written:  # a leaf may not be written to
                    given = [t.clone() for t in tensors]
            full = list(self.leaves)
            for i, t in zip(self.places, given, strict=True):
                full[i] = t
            a, k = torch_tree.tree_unflatten(full, self.spec)
            if self.stream is not None:
                self.stream.count = self.start  # every run draws the same
            depth, _active.depth = _active.depth, 0
            try:
                out = _plain(self.cls, *a, **k)
            finally:
                _active.depth = depth
            outs, out_spec = torch_tree.tree_flatten(out)
            made = [x for x in outs if isinstance(x, Tensor)]
            if not requires_grad:
                self.outs = [(_TENSOR, x.dtype) if isinstance(x, Tensor) else x for x in outs]
                self.out_spec = out_spec
                self.written = {
                    j: i for j, x in enumerate(made) for i, t in enumerate(given) if x is t
                }
        return tensors, made

    def _backward(self, arrays: Any, cotangents: Any) -> Any:
        with self.resume():
            return self._gradients(arrays, cotangents)

    def _gradients(self, arrays: Any, cotangents: Any) -> Any:
        inputs, outs = self._run(arrays, True)
        pairs = [
            (x, wrap(ct, x.dtype)) for x, ct in zip(outs, cotangents, strict=True) if recorded(x)
        ]
        wanted = [x for x in inputs if recorded(x)]
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
            if not recorded(x):
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

    def outputs(self, results: list[Any], given: list[Tensor]) -> Any:
        """Return what the call returns; an input that was written to is returned itself."""
        found: list[Any] = []
        numbered = enumerate(results)
        for x in self.outs:
            if type(x) is not tuple or x[0] is not _TENSOR:
                found.append(x)
                continue
            j, result = next(numbered)
            if j in self.written:
                found.append(given[self.written[j]])
                write(found[-1], result)
            else:
                found.append(wrap(result, x[1]))
        return torch_tree.tree_unflatten(found, self.out_spec)


_TENSOR = object()


replace_while_tracing(custom_function_base, "apply", classmethod(_apply))
