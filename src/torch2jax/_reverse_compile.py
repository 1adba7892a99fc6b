"""Programs of JAX in graphs of ``torch.compile``: one custom operator applies them all.

In a compiled function a call becomes ``torch2jax::apply(tensors, floats, ints, program)``, with the
name of the program. Its fake kernel asks JAX for shapes, its gradient is an ``apply`` of the
pullback, its batch one of the batched program. Eager calls and ``torch.func`` do not come here: a
custom operator has silently no tangents in forward mode. This module is imported when
``torch.compile`` first meets a call, since ``torch._dynamo`` takes a second to load.

NOTE [Names of programs]. PyTorch keeps compiled graphs on disk; a name must not mean another
function in another process, so it holds a number drawn for this one.
"""

from __future__ import annotations

import itertools
import secrets
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import torch

from ._compat import precision
from ._dtypes import canonical, dtype_j2t, dtype_t2j, x64_enabled
from ._errors import Torch2JaxError, UnsupportedDtypeError
from ._ffi import requiring_grad
from ._jax_program import Program, Traced
from ._reverse import named
from ._reverse_autograd import Call, apply
from ._torch_compat import forward_ad_active, nonstrict_trace, transforms_active

Tensor = torch.Tensor

_PROCESS = secrets.token_hex(8)
_numbers = itertools.count()
_sites: weakref.WeakValueDictionary[str, Site] = weakref.WeakValueDictionary()


class Site:
    """A program and the kinds of its operands. The program keeps it alive; graphs hold its name.

    ``kinds``: "tensor", "float", "int", or a tuple of one value that is a part of the graph.
    ``n_primals``: the operands after them are cotangents, and at the end ``n_held`` held values.
    """

    def __init__(
        self, program: Program, kinds: tuple[Any, ...], n_primals: int, n_held: int, x64: bool
    ) -> None:
        self._program = weakref.ref(program)
        self.kinds, self.n_primals, self.n_held, self.x64 = kinds, n_primals, n_held, x64
        self.tensors = [i for i, kind in enumerate(kinds) if kind == "tensor"]
        self.name = f"{program.name}/{_PROCESS}/{next(_numbers)}"
        _sites[self.name] = self

    @property
    def program(self) -> Program:
        program = self._program()
        if program is None:
            raise _gone(self.name)
        return program

    @staticmethod
    def of(
        program: Program, kinds: tuple[Any, ...], n_primals: int, n_held: int, x64: bool
    ) -> Site:
        key = (kinds, n_primals, n_held, x64)
        site = program.sites.get(key)
        return site or program.sites.setdefault(key, Site(program, *key))

    def operands(self, tensors: Sequence[Any], floats: Sequence[Any], ints: Sequence[Any]) -> Any:
        given = {"tensor": iter(tensors), "float": iter(floats), "int": iter(ints)}
        return [next(given[k]) if isinstance(k, str) else k[0] for k in self.kinds]

    def run(self, operands: Sequence[Any]) -> list[Tensor]:
        return list(Call(self.program, self.x64, self.n_primals).run(operands))

    def shapes(self, operands: Sequence[Any]) -> Traced:
        """What ``run`` will return: nothing is computed, and a trace is found again by the run."""
        reads = self.program.reads
        with precision(self.x64):
            avals = [
                None if reads is not None and i < self.n_primals and i not in reads else _aval(x)
                for i, x in enumerate(operands)
            ]
            return self.program.jitted.eval_shape(*avals)  # type: ignore[attr-defined]


@nonstrict_trace
def call_in_graph(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of the ``JaxFunction`` of that name: what ``torch.compile`` does not look into."""
    function = named.get(name)
    if function is None:
        raise Torch2JaxError(f"{name}, a result of jax2torch, is gone.")
    return function.call_by(apply_in_graph, args, kwargs)


def apply_in_graph(program: Program, operands: Sequence[Any]) -> Any:
    """``apply`` of _reverse_autograd.py, as one node of a graph."""
    if transforms_active() or forward_ad_active():  # there the operator has no derivatives
        return apply(program, operands, GraphCall)
    x64 = x64_enabled()
    asking = requiring_grad(operands) if torch.is_grad_enabled() else ()
    if asking:
        program = program.emission(asking)
    site = Site.of(program, tuple(map(_kind, operands)), len(operands), 0, x64)
    traced = site.shapes(operands)
    outs = _call(site, operands)
    return outs[: len(traced.outs)], traced.facts.tree


class GraphCall(Call):
    """An application below ``torch.func`` in a graph: the node is what runs at the bottom."""

    __slots__ = ()

    def run(self, operands: Sequence[Any]) -> list[Tensor]:
        kinds = tuple(map(_kind, operands))
        site = Site.of(self.program, kinds, self.n_primals, 0, self.x64)
        traced = site.shapes(operands)
        self.facts = traced.facts
        return _call(site, operands)


def _call(site: Site, operands: Sequence[Any]) -> list[Tensor]:
    by_kind: dict[str, list[Any]] = {"tensor": [], "float": [], "int": []}
    for kind, x in zip(site.kinds, operands, strict=True):
        if isinstance(kind, str):
            by_kind[kind].append(x)
    return _op(by_kind["tensor"], by_kind["float"], by_kind["int"], site.name)


def _kind(x: Any) -> Any:
    if isinstance(x, Tensor):
        return "tensor"
    if type(x) in (float, torch.SymFloat):
        return "float"
    if type(x) in (int, torch.SymInt):
        return "int"
    return _Constant(x)


class _Constant(tuple):
    """An operand that is a part of the graph: ``(value,)``, equal by value or by identity."""

    def __new__(cls, value: Any) -> _Constant:
        return super().__new__(cls, (value,))

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constant) and self._key() == other._key()

    def _key(self) -> Any:
        value = self[0]
        return type(value), value if isinstance(value, bool | complex) else id(value)


def _aval(x: Any) -> Any:
    if not isinstance(x, Tensor):
        number = {torch.SymFloat: float, torch.SymInt: int}.get(type(x))
        return x if number is None else number(x)
    dtype = canonical(x.dtype)
    if dtype != dtype_t2j(x.dtype) and x.dtype is not torch.int64:
        raise UnsupportedDtypeError(
            f"got a tensor of {x.dtype}, and 64-bit values are switched off in JAX. Switch them "
            'on, jax.config.update("jax_enable_x64", True), or convert the tensor first.'
        )
    # Sizes that the graph leaves open become fixed: JAX compiles for each shape.
    return jax.ShapeDtypeStruct(tuple(map(int, x.shape)), dtype)


def _find(name: str) -> Site:
    site = _sites.get(name)
    if site is None:
        raise _gone(name)
    return site


def _gone(name: str) -> Torch2JaxError:
    return Torch2JaxError(
        f"the JAX function {name} of a compiled graph is gone: it lives as long as what jax2torch "
        "returned, in the process that compiled the graph."
    )


# --- the operator --------------------------------------------------------------------------------


@torch.library.custom_op(
    f"{__name__.partition('.')[0]}::apply",
    mutates_args=(),
    # Written out, because torch 2.6 does not read the annotations below.
    schema="(Tensor[] tensors, float[] floats, SymInt[] ints, str program) -> Tensor[]",
)
def _op(
    tensors: Sequence[Tensor], floats: Sequence[float], ints: Sequence[int], program: str
) -> list[Tensor]:
    site = _find(program)
    return site.run(site.operands(tensors, floats, ints))


@_op.register_fake
def _(tensors: Any, floats: Any, ints: Any, program: str) -> list[Tensor]:
    site = _find(program)
    traced = site.shapes(site.operands(tensors, floats, ints))
    device = tensors[0].device if tensors else torch.get_default_device()
    return [
        torch.empty(aval.shape, dtype=dtype_j2t(aval.dtype), device=device)
        for aval in (*traced.outs, *traced.residuals)
    ]


def _setup_context(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    tensors, ctx.floats, ctx.ints, program = inputs
    ctx.site = site = _find(program)
    traced = site.shapes(site.operands(tensors, ctx.floats, ctx.ints))
    ctx.n_tensors, ctx.n_outs = len(tensors), len(traced.outs)
    ctx.plan = plan = traced.facts.plan if site.program.is_emission else None
    kept = [output[j] for j in plan.kept] if plan else []
    ctx.save_for_backward(*tensors, *kept, *output[ctx.n_outs :])


def _backward(ctx: Any, cotangents: Sequence[Tensor | None]) -> Any:
    site, plan = ctx.site, ctx.plan
    tensors, held = ctx.saved_tensors[: ctx.n_tensors], ctx.saved_tensors[ctx.n_tensors :]
    n = len(site.kinds)
    primals = [
        (i, x)
        for i, x in zip(site.tensors, tensors, strict=True)
        if (x.is_floating_point() or x.is_complex()) and i < n - site.n_held
    ]
    # An exported program may be asked for more gradients than the trace that chose the residuals.
    if plan and not all(i in plan.wrt for i, x in primals if x.requires_grad):
        plan = None
    wrt = tuple(i for i, _ in primals if plan is None or i in plan.wrt)
    of = tuple(
        j
        for j, c in enumerate(cotangents[: ctx.n_outs])
        if c is not None and (c.is_floating_point() or c.is_complex())
    )
    grads: list[Tensor | None] = [None] * len(tensors)
    if wrt and of:
        held = held if plan else ()
        program = site.program.pullback(n, wrt, of, plan)
        kinds = (*site.kinds, *["tensor"] * (len(of) + len(held)))
        pullback = Site.of(program, kinds, n, len(held), site.x64)
        operands = site.operands(tensors, ctx.floats, ctx.ints)
        found = _call(pullback, [*operands, *(cotangents[j] for j in of), *held])
        for i, grad in zip(wrt, found, strict=True):
            grads[site.tensors.index(i)] = grad
    # As custom_op wants it: an empty list has a structure, a list of numbers is one leaf.
    return grads, None if ctx.floats else [], None if ctx.ints else [], None


def _vmap(
    info: Any, in_dims: Any, tensors: Any, floats: Any, ints: Any, program: str
) -> tuple[list[Tensor], list[int]]:
    site = _find(program)
    dims: list[int | None] = [None] * len(site.kinds)
    for i, d in zip(site.tensors, in_dims[0], strict=True):
        dims[i] = d
    program_of_rows = site.program.batch(tuple(dims))
    batched = Site.of(program_of_rows, site.kinds, site.n_primals, site.n_held, site.x64)
    rows = _op(tensors, floats, ints, batched.name)
    return rows, [0] * len(rows)


_op.register_autograd(_backward, setup_context=_setup_context)
_op.register_vmap(_vmap)
