"""A compiled call becomes one node of PyTorch's autograd."""

from __future__ import annotations

from typing import Any

import jax
import torch

from ..tensors.tensor import wrap
from ..tracing.cotangents import cotangents_of, gradient_of
from .compiled import CompiledCall

__all__ = ["Differentiable"]

_pull = jax.jit(lambda pull, cotangents: pull(cotangents))


class Differentiable(torch.autograd.Function):
    """A node runs a compiled call; its derivative is JAX's and is compiled too."""

    @staticmethod
    def forward(ctx: Any, compiled: CompiledCall, words: Any, count: int, *tensors: Any) -> Any:  # type: ignore[override]
        arrays = [x._cell.array if x._chain is None else x.jax() for x in tensors[:count]]
        state = [c.array for c in compiled.inputs]
        results, new_state, made, ctx.pull = compiled.pulled(arrays, state, *words)
        compiled.finish(tensors[:count], new_state, made)
        ctx.needs = [(id(x._cell), x._chain) for x in tensors[count:]]
        ctx.order = [id(c) for c in compiled.inputs]
        ctx.avals = [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in results]
        ctx.count = count
        outs = tuple(wrap(r, d) for r, d in zip(results, compiled.dtypes, strict=True))
        ctx.mark_non_differentiable(
            *[
                x
                for i, x in enumerate(outs)
                if i in compiled.detached or not (x.is_floating_point() or x.is_complex())
            ]
        )
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        by_argument, by_state = _pull(ctx.pull, cotangents_of(grads, ctx.avals))
        found = list(by_argument)
        for cell, chain in ctx.needs:  # parameters of weight_norm are views
            g = by_state[ctx.order.index(cell)]
            found.append(g if chain is None else chain.get(g))
        return (None, None, None, *[gradient_of(g) for g in found])
