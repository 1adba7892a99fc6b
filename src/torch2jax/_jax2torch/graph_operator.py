"""One custom operator applies all programs of JAX in graphs of ``torch.compile``.

In a compiled function a call becomes ``torch2jax::apply(tensors, floats, ints, program)``, with the
name of the program. Its fake kernel asks JAX for shapes. Its gradient is an ``apply`` of the
pullback, and its batch is one of the batched program. Eager calls and ``torch.func`` do not come
here: a custom operator has silently no tangents in forward mode. This module is imported when
``torch.compile`` first meets a call, since ``torch._dynamo`` takes a second to load.

NOTE [Names of programs]. PyTorch keeps compiled graphs on disk. A name must not mean another
function in another process, so it holds a number drawn for this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._bridge.handler.extension import requiring_grad
from .._compat.jax import settings
from .._compat.torch import forward_ad_active, nonstrict_trace, transforms_active
from .._conversions.dtypes import dtype_j2t
from .._errors import Torch2JaxError
from .autograd import Call, apply
from .graph_sites import Site, Tensor, kind_of, named, site_named
from .programs import JaxProgram


@nonstrict_trace
def call_in_graph(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the ``JaxFunction`` of that name; ``torch.compile`` does not look into it."""
    function = named.get(name)
    if function is None:
        raise Torch2JaxError(f"{name}, a result of jax2torch, is gone.")
    return function.call_by(apply_in_graph, args, kwargs)


def apply_in_graph(program: JaxProgram, operands: Sequence[Any]) -> Any:
    """Do what ``apply`` of ``autograd`` does, as one node of a graph."""
    if transforms_active() or forward_ad_active():  # there the operator has no derivatives
        return apply(program, operands, GraphCall)
    asking = requiring_grad(operands) if torch.is_grad_enabled() else ()
    if asking:
        program = program.emission(asking)
    site = Site.of(program, tuple(map(kind_of, operands)), len(operands), 0, settings())
    traced = site.shapes(operands)
    outs = _call(site, operands)
    return outs[: len(traced.outs)], traced.facts.tree


class GraphCall(Call):
    """A ``GraphCall`` is one below ``torch.func`` in a graph, where the node runs at the bottom."""

    __slots__ = ()

    def run(self, operands: Sequence[Any]) -> list[Tensor]:
        kinds = tuple(map(kind_of, operands))
        site = Site.of(self.program, kinds, self.n_primals, 0, self.settings)
        traced = site.shapes(operands)
        self.facts = traced.facts
        return _call(site, operands)


def _call(site: Site, operands: Sequence[Any]) -> list[Tensor]:
    by_kind: dict[str, list[Any]] = {"tensor": [], "float": [], "int": []}
    for kind, x in zip(site.kinds, operands, strict=True):
        if isinstance(kind, str):
            by_kind[kind].append(x)
    return _op(by_kind["tensor"], by_kind["float"], by_kind["int"], site.name)


# --- the operator --------------------------------------------------------------------------------


@torch.library.custom_op(
    f"{__name__.partition('.')[0]}::apply",
    mutates_args=(),
    # It is written out, because torch 2.6 does not read the annotations below.
    schema="(Tensor[] tensors, float[] floats, SymInt[] ints, str program) -> Tensor[]",
)
def _op(
    tensors: Sequence[Tensor], floats: Sequence[float], ints: Sequence[int], program: str
) -> list[Tensor]:
    site = site_named(program)
    return site.run(site.operands(tensors, floats, ints))


@_op.register_fake
def _(tensors: Any, floats: Any, ints: Any, program: str) -> list[Tensor]:
    site = site_named(program)
    traced = site.shapes(site.operands(tensors, floats, ints))
    device = tensors[0].device if tensors else torch.get_default_device()
    return [
        torch.empty(aval.shape, dtype=dtype_j2t(aval.dtype), device=device)
        for aval in (*traced.outs, *traced.residuals)
    ]


def _setup_context(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    tensors, ctx.floats, ctx.ints, program = inputs
    ctx.site = site = site_named(program)
    traced = site.shapes(site.operands(tensors, ctx.floats, ctx.ints))
    ctx.n_tensors, ctx.n_outs = len(tensors), len(traced.outs)
    ctx.recipe = recipe = traced.facts.recipe if site.program.is_emission else None
    kept = [output[j] for j in recipe.kept] if recipe else []
    ctx.save_for_backward(*tensors, *kept, *output[ctx.n_outs :])


def _backward(ctx: Any, cotangents: Sequence[Tensor | None]) -> Any:
    site, recipe = ctx.site, ctx.recipe
    tensors, held = ctx.saved_tensors[: ctx.n_tensors], ctx.saved_tensors[ctx.n_tensors :]
    n = len(site.kinds)
    primals = [
        (i, x)
        for i, x in zip(site.tensors, tensors, strict=True)
        if (x.is_floating_point() or x.is_complex()) and i < n - site.n_held
    ]
    # An exported program may be asked for more gradients than the trace that chose the residuals.
    if recipe and not all(i in recipe.wrt for i, x in primals if x.requires_grad):
        recipe = None
    wrt = tuple(i for i, _ in primals if recipe is None or i in recipe.wrt)
    of = tuple(
        j
        for j, c in enumerate(cotangents[: ctx.n_outs])
        if c is not None and (c.is_floating_point() or c.is_complex())
    )
    grads: list[Tensor | None] = [None] * len(tensors)
    if wrt and of:
        held = held if recipe else ()
        program = site.program.pullback(n, wrt, of, recipe)
        kinds = (*site.kinds, *["tensor"] * (len(of) + len(held)))
        pullback = Site.of(program, kinds, n, len(held), site.settings)
        operands = site.operands(tensors, ctx.floats, ctx.ints)
        found = _call(pullback, [*operands, *(cotangents[j] for j in of), *held])
        for i, grad in zip(wrt, found, strict=True):
            grads[site.tensors.index(i)] = grad
    # custom_op wants it so: an empty list has a structure, and a list of numbers is one leaf.
    return grads, None if ctx.floats else [], None if ctx.ints else [], None


def _vmap(
    info: Any, in_dims: Any, tensors: Any, floats: Any, ints: Any, program: str
) -> tuple[list[Tensor], list[int]]:
    site = site_named(program)
    dims: list[int | None] = [None] * len(site.kinds)
    for i, d in zip(site.tensors, in_dims[0], strict=True):
        dims[i] = d
    program_of_rows = site.program.batch(tuple(dims))
    batched = Site.of(program_of_rows, site.kinds, site.n_primals, site.n_held, site.settings)
    rows = _op(tensors, floats, ints, batched.name)
    return rows, [0] * len(rows)


_op.register_autograd(_backward, setup_context=_setup_context)
_op.register_vmap(_vmap)
