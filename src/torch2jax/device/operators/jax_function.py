"""A JAX function of arrays becomes one node of PyTorch's autograd, with JAX's derivative.

The backward pass under ``create_graph=True`` is such a node too, so derivatives have derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch
from jax.core import Tracer

from ..._conversions.cotangents import cotangents_of, gradient_of
from ..._conversions.dtypes import dtype_j2t
from ..._conversions.narrowed import WIDENED
from ..tensors.tensor import Tensor, captures, recorded, wrap
from ..thread_state import state
from .constants import value_of
from .cut import cut
from .operands import note_read

__all__ = ["apply_jax"]


def apply_jax(fn: Callable[[list[Any]], Any], tensors: Sequence[Tensor], wide: bool = False) -> Any:
    """Call ``fn`` with the arrays of tensors on device jax, and return its arrays as tensors.

    With ``wide`` float32 results are said to be float64, which JAX carries as float32.

    In a trace that JAX differentiates, JAX differentiates the call too, unless PyTorch's autograd
    is at work.
    """
    if captures:
        note_read(tensors)
    graph = torch.is_grad_enabled()
    traced = [x for x in tensors if isinstance(x._cell.array, Tracer)]
    if state.lowering and not (graph and any(map(recorded, traced))):
        out = jax.tree.map(jax.numpy.asarray, fn([value_of(x) for x in tensors]))
        if not graph:
            out = jax.tree.map(cut, out)
        return jax.tree.map(lambda x: _tensor(x, wide), out)
    box: list[Any] = [wide]
    outs = _JaxFunction.apply(fn, box, *tensors)
    return box[0].unflatten(outs)


class _JaxFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fn: Any, box: list[Any], *tensors: Any) -> Any:  # type: ignore[override]
        places = [i for i, needs in enumerate(ctx.needs_input_grad[2:]) if needs]
        arrays = [value_of(x) for x in tensors]

        def of(*chosen: Any) -> Any:
            return fn(_replaced(arrays, places, chosen))

        if places:
            out, ctx.pull = jax.vjp(of, *[arrays[i] for i in places])
        else:
            out = of()
        leaves, structure = jax.tree.flatten(out)
        wide = box[0]
        box[:] = [structure]
        ctx.fn, ctx.places, ctx.structure = fn, places, structure
        ctx.out = [jax.typeof(x) for x in leaves]
        ctx.save_for_backward(*tensors)
        outs = tuple(_tensor(jax.numpy.asarray(x), wide) for x in leaves)
        ctx.mark_non_differentiable(
            *[x for x in outs if not (x.is_floating_point() or x.is_complex())]
        )
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        found: list[Any] = [None] * len(ctx.needs_input_grad)
        given = [i for i, (g, a) in enumerate(zip(grads, ctx.out, strict=True)) if _counts(g, a)]
        if torch.is_grad_enabled():
            tensors, count = ctx.saved_tensors, len(ctx.saved_tensors)

            def pulled(arrays: list[Any]) -> Any:
                def of(*chosen: Any) -> Any:
                    return ctx.fn(_replaced(arrays[:count], ctx.places, chosen))

                _, pull = jax.vjp(of, *[arrays[i] for i in ctx.places])
                return pull_back(pull, arrays[count:])
        else:
            tensors, count = (), 0

            def pulled(arrays: list[Any]) -> Any:
                return pull_back(ctx.pull, arrays)

        def pull_back(pull: Any, arrays: Sequence[Any]) -> Any:
            by_place = dict(zip(given, arrays, strict=True))
            full = [by_place.get(i) for i in range(len(ctx.out))]
            found = cotangents_of(full, [(a.shape, a.dtype) for a in ctx.out])
            return list(map(gradient_of, pull(ctx.structure.unflatten(found))))

        if given:
            results = apply_jax(pulled, (*tensors, *[grads[i] for i in given]))
            for i, g in zip(ctx.places, results, strict=True):
                found[2 + i] = g
        return tuple(found)


def _replaced(arrays: Sequence[Any], places: Sequence[int], chosen: Sequence[Any]) -> list[Any]:
    full = list(arrays)
    for i, x in zip(places, chosen, strict=True):
        full[i] = x
    return full


def _counts(gradient: Any, aval: Any) -> bool:
    return gradient is not None and jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact)


def _tensor(array: Any, wide: bool) -> Tensor:
    dtype = dtype_j2t(array.dtype)
    return wrap(array, WIDENED[dtype] if wide and dtype is torch.float32 else dtype)
