"""Composite operators are one call here: one program forward, and one backward.

PyTorch makes a linear layer of ``t`` and ``addmm`` and of ten more calls in its backward pass. On
small arrays each call costs a dozen microseconds, whatever it computes. Kernels for autograd's key
take such an operator as a whole, with a derivative that is one operator too. PyTorch's own parts
run for rare arguments, and where something looks at the parts: a transform of ``torch.func``,
forward-mode derivatives, a mode, or JAX's derivative of what PyTorch differentiates.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jax.core import Tracer
from torch.utils import _pytree as torch_tree

from ..._compat.torch import dispatch_modes, eager, plain_apply
from ..tensors.tensor import Tensor, known, read, replace
from ..thread_state import state
from .dispatch import dispatch
from .operands import moved
from .recurrent import KERNELS as RECURRENT
from .unchecked import cov, istft

__all__ = ["register_composites"]

aten = torch.ops.aten


class _Composite(NamedTuple):
    """A composite is an operator that is linear in each operand, and its derivative.

    ``need`` has one flag for each operand. ``takes(operands)`` says whether the derivative covers
    them. ``saved(need)`` says which operands it reads. PyTorch's parts keep no others, so a program
    may write to the others before the backward pass. ``arguments(gradient, operands, need)`` are
    those of ``backward``. ``by_parts`` takes the same and is the derivative in PyTorch's operators,
    which can be differentiated and mapped.
    """

    op: Any
    backward: Any
    takes: Callable[..., bool]
    saved: Callable[[Any], tuple[bool, ...]]
    arguments: Callable[[Any, Any, Any], tuple[Any, ...]]
    by_parts: Callable[[Any, Any, Any], tuple[Any, ...]]


_linear_taken: dict[Any, bool] = {}
"""What ``_takes_linear`` has answered for operands of these sorts. Sizes cost PyTorch 2 µs."""


def _takes_linear(input: Tensor, weight: Tensor, bias: Any = None) -> bool:
    sorts = input._sort, weight._sort, bias if bias is None else bias._sort
    taken = _linear_taken.get(sorts)
    if taken is None:
        taken = weight.ndim == 2 and input.ndim > 0
        taken = taken and (bias is None or bias.shape == weight.shape[:1])
        if None not in sorts[:2] and (bias is None or sorts[2] is not None):
            if len(_linear_taken) >= 65536:
                _linear_taken.clear()
            _linear_taken[sorts] = taken
    return taken


def _linear_by_parts(g: Any, operands: Any, need: Any) -> tuple[Any, ...]:
    input, weight, *_ = operands
    rows = g.reshape(math.prod(g.shape[:-1]), g.shape[-1])
    return (
        g @ weight.conj() if need[0] else None,
        rows.mT @ input.reshape(len(rows), input.shape[-1]).conj() if need[1] else None,
        rows.sum(0) if len(need) > 2 and need[2] else None,
    )


def _matmul_by_parts(g: Any, operands: Any, need: Any) -> tuple[Any, ...]:
    self, other = operands
    a = self[None] if self.ndim == 1 else self
    b = other[:, None] if other.ndim == 1 else other
    g = g.unsqueeze(-1) if other.ndim == 1 else g
    g = g.unsqueeze(-2) if self.ndim == 1 else g
    da, db = (g @ b.mH).sum_to_size(a.shape), (a.mH @ g).sum_to_size(b.shape)
    return da.reshape(self.shape), db.reshape(other.shape)


_COMPOSITES = (
    _Composite(
        aten.linear.default,
        aten.linear_backward.default,
        _takes_linear,
        lambda need: (need[1], need[0], False),
        lambda g, x, need: (x[0], g, x[1], (need[0], need[1], len(need) > 2 and need[2])),
        _linear_by_parts,
    ),
    _Composite(
        aten.matmul.default,
        aten.matmul_backward.default,
        lambda self, other: self.requires_grad and other.requires_grad,
        lambda need: need,
        lambda g, x, need: (g, x[0], x[1], need),
        _matmul_by_parts,
    ),
)


def register_composites() -> Any:
    """Put the kernels in place. They last as long as what is returned."""
    library = torch.library.Library("aten", "IMPL")
    for composite in _COMPOSITES:
        kernel = _kernel(composite)
        for key in ("AutogradLazy", "AutogradPrivateUse1"):
            library.impl(composite.op._opname, kernel, key)
    others = {
        "one_hot": _one_hot,
        "ctc_loss.Tensor": _ctc_loss,
        "cov": cov,
        "matmul.out": _matmul_out,
        "istft": istft,
        "stft": _together(aten.stft.default),
        "stft.center": _together(aten.stft.center),
        "inner": _together(aten.inner.default),
        "linalg_multi_dot": _together(aten.linalg_multi_dot.default),
        "meshgrid": _together(aten.meshgrid.default),
        "meshgrid.indexing": _together(aten.meshgrid.indexing),
        "scaled_dot_product_attention": _together(aten.scaled_dot_product_attention.default),
        "take_along_dim": _together(aten.take_along_dim.default),
        **RECURRENT,
        **_DENSE,
    }
    for name, kernel in others.items():
        for key in ("AutogradLazy", "AutogradPrivateUse1", "Lazy", "PrivateUse1"):
            library.impl(name, kernel, key)
    return library


def _one_hot(classes: Any, num_classes: int = -1) -> Any:
    """Refuse classes that are not there, where they are known."""
    if classes.dtype is not torch.int64:
        raise RuntimeError("one_hot is only applicable to index tensor of type LongTensor.")
    values = known(classes) if type(classes) is Tensor and num_classes > 0 else None
    if values is not None and not isinstance(values, Tracer) and values.size:
        if int(values.min()) < 0:
            raise RuntimeError("Class values must be non-negative.")
        if int(values.max()) >= num_classes:
            raise RuntimeError("Class values must be smaller than num_classes.")
    return aten.one_hot.default.decompose(classes, num_classes)


def _matmul_out(self: Any, other: Any, *, out: Any) -> Any:
    """Write the product. PyTorch's kernel asks whether two tensors have one storage."""
    found = aten.matmul.default(self, other)
    if found.dtype is not out.dtype:
        raise RuntimeError(
            f"Expected out tensor to have dtype {found.dtype}, but got {out.dtype} instead"
        )
    if type(out) is not Tensor or (
        torch.is_grad_enabled() and (found.requires_grad or out.requires_grad)
    ):
        raise RuntimeError(
            "matmul(): functions with out=... arguments don't support automatic differentiation, "
            "but one of the arguments requires grad."
        )
    replace(out, read(found))
    return out


def _together(op: Any) -> Callable[..., Any]:
    """Return PyTorch's parts of an operator that wants all its operands on one device.

    Under ``lower=True`` tensors of other devices are constants of the function.
    """

    def kernel(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = torch_tree.tree_map(moved, (args, kwargs))
        return op.decompose(*args, **kwargs)

    return kernel


def _ctc_loss(scores: Any, targets: Any, steps: Any, sizes: Any, *rest: Any) -> Any:
    """Move the lengths, by which a part divides; they may be on the CPU, as beside CUDA tensors."""
    place = scores.device
    return aten.ctc_loss.Tensor.decompose(scores, targets, steps.to(place), sizes.to(place), *rest)


def _dense(op: Any, sparse: int) -> Callable[..., Any]:
    """Return a derivative that is dense, whatever its argument ``sparse`` says."""

    def kernel(*args: Any) -> Any:
        return op.decompose(*args[:sparse], False, *args[sparse + 1 :])

    return kernel


_DENSE = {
    "embedding_backward": _dense(aten.embedding_backward.default, 5),
    "gather_backward": _dense(aten.gather_backward.default, 4),
}
"""Arrays of JAX are dense, and so are these gradients."""


def _kernel(composite: _Composite) -> Callable[..., Any]:
    op, apply = composite.op, plain_apply(_function(composite))

    def kernel(*operands: Any) -> Any:
        needed = False
        for x in operands:
            if type(x) is Tensor:
                needed = needed or x.requires_grad
            elif x is not None:
                return op.decompose(*operands)
        if not eager() or _watched():
            return op.decompose(*operands)
        if not (needed and torch.is_grad_enabled()):
            return dispatch(op, (), operands)
        if not composite.takes(*operands):
            return op.decompose(*operands)
        return apply(*operands)

    return kernel


def _watched() -> bool:
    """Say whether a mode that is not ours wants to see the parts."""
    return dispatch_modes() > state.watches


_AS_IT_IS = contextlib.nullcontext()


def _function(composite: _Composite) -> Any:
    op = composite.op

    def forward(ctx: Any, *operands: Any) -> Any:
        keep = composite.saved(ctx.needs_input_grad)
        ctx.save_for_backward(*[x if k else None for x, k in zip(operands, keep, strict=False)])
        with torch.enable_grad() if state.lowering else _AS_IT_IS:  # JAX differentiates it as well
            return dispatch(op, (), operands)

    def backward(ctx: Any, g: Any) -> Any:
        operands, need = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled() or type(g) is not Tensor or _watched():
            found = composite.by_parts(g, operands, need)
        else:
            found = dispatch(composite.backward, (), composite.arguments(g, operands, need))
        return found[: len(need)]

    # JAX differentiates what it does, operator by operator: see tracing/autograd_functions.py.
    body = {"forward": staticmethod(forward), "backward": staticmethod(backward), "of_jax": True}
    base: Any = torch.autograd.Function
    return type(base)(op._opname, (base,), body)
