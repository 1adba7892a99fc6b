"""A function of pytrees becomes one from flat tensors to flat tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch

from ..._conversions.dtypes import dtype_j2t, x64_enabled
from ..._conversions.narrowed import WIDENED
from .arguments import Arguments, Tensor, Tensors
from .results import SINGLE, Result, collector


def flat_function(
    fn: Callable[..., Any],
    arguments: Arguments,
    result: Result,
    label: str,
    inplace: Sequence[int] = (),
) -> tuple[Callable[..., Tensors], Callable[..., Tensors] | None, Bare | None]:
    """Return ``(pure, run, bare)``: ``fn`` from flat operands to a tuple in JAX's dtypes.

    With ``inplace`` operands, the tuple ends with their updated values; ``pure`` works on copies of
    them, ``run`` on the operands themselves. ``run`` is None where it would be ``pure``, and
    ``bare`` is None unless ``fn`` takes the operands as they are and returns one tensor.
    """
    call = arguments.applied(fn)
    collect = collector(result, label)
    # Where a result was inferred, its torch dtype is known; a declared result may come wide.
    casts = [
        (i, dtype)
        for i, leaf in enumerate(result.leaves)
        if (dtype := dtype_j2t(leaf.dtype)) in WIDENED
        and not x64_enabled()
        and (result.declared or leaf.torch_dtype is not dtype)
    ]
    narrowed = [i for i, dtype in casts if not (dtype.is_floating_point or dtype.is_complex)]

    def forward(operands: Tensors) -> Tensors:
        xs = arguments.prepare(operands)
        leaves = collect(call(*xs))
        # An operand that reached fn in another dtype comes back in its own.
        return (*leaves, *(xs[i].to(operands[i].dtype) for i in inplace))

    def pure(*operands: Tensor) -> Tensors:
        xs = tuple(x.clone() if i in inplace else x for i, x in enumerate(operands))
        return _cast(forward(xs), casts)

    def run(*operands: Tensor) -> Tensors:
        leaves = forward(operands)
        for i in narrowed:
            leaf = result.leaves[i]
            _check_range(leaves[i], dtype_j2t(leaf.dtype), leaf.label, label)
        return _cast(leaves, casts)

    if casts or inplace:
        return pure, run if inplace or narrowed else None, None
    if arguments.casts or arguments.copies:
        return (lambda *operands: forward(operands)), None, None
    bare = (call, collect) if result.treedef == SINGLE else None
    return (lambda *operands: collect(call(*operands))), None, bare


Bare = tuple[Callable[..., Any], Callable[[Any], Tensors]]


def _cast(leaves: Tensors, casts: Sequence[tuple[int, torch.dtype]]) -> Tensors:
    out = list(leaves)
    for i, dtype in casts:
        if out[i].dtype is WIDENED[dtype]:
            out[i] = out[i].to(dtype)
    return tuple(out)


def _check_range(t: Tensor, dtype: torch.dtype, path: str, label: str) -> None:
    """Raise where 64-bit integers do not fit 32 bits; on a GPU nobody looks, as that would wait."""
    if t.device.type != "cpu" or t.numel() == 0 or t.dtype is not WIDENED[dtype]:
        return
    unsigned = t.dtype is torch.uint64  # PyTorch has no aminmax for it
    low, high = (int(x) for x in torch.aminmax(t.view(torch.int64) if unsigned else t))
    if unsigned and low < 0:
        low, high = 0, low + 2**64
    info = torch.iinfo(dtype)
    if low < info.min or high > info.max:
        raise OverflowError(
            f"{path} of {label} holds {low if low < info.min else high}, which does not fit "
            f'{dtype}; jax.config.update("jax_enable_x64", True) keeps 64-bit integers.'
        )


def out_function(
    fn: Callable[..., Any],
    arguments: Arguments,
    result: Result,
    out_arg: str,
    label: str,
) -> Callable[..., Tensors]:
    """Return ``run`` for a function that writes its results into ``out_arg``, XLA's own buffers."""
    collect = collector(result, label)

    def run(*operands: Tensor) -> Tensors:
        n = len(operands) - len(result.leaves)
        outputs = operands[n:]
        buffers = result.treedef.unflatten(outputs)
        call = arguments.applied(functools.partial(fn, **{out_arg: buffers}))
        returned = call(*arguments.prepare(operands[:n]))
        return outputs if returned is None else collect(returned)

    return run


def with_buffers(fn: Callable[..., Any], out_arg: str, result: Result) -> Callable[..., Any]:
    """Return ``fn``, which needs ``out_arg``, as a function that allocates its results."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = [x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = given[0].device if given else None
        buffers = result.treedef.unflatten(
            [torch.empty(r.shape, dtype=dtype_j2t(r.dtype), device=device) for r in result.leaves]
        )
        returned = fn(*args, **kwargs, **{out_arg: buffers})
        return buffers if returned is None else returned

    return call
