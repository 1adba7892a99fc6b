"""Programs of JAX are applied to tensors, below PyTorch's autograd and ``torch.func``.

NOTE [One Function]. ``ApplyProgram`` applies any program; its derivatives and batches apply derived
programs, by ``ApplyProgram`` again wherever something may differentiate or batch them further. So
every composition of transforms, to any order, is a chain of such applications.

NOTE [Residuals]. An application that a gradient is asked of runs the program's emission. The
residuals are further results of it, without derivatives, and are saved like all tensors: hooks
(``torch.utils.checkpoint``, ``save_place``) see them, operands and results among them keep
PyTorch's version check, and a backward pass frees them. Where nothing but autograd looks on,
``Direct`` keeps them as arrays, which spares the way to tensors and back, 4 µs each.

NOTE [Memory]. An operand is a view of a tensor. On a CPU the results are computed when the call
returns, so the tensor may be written to from then on. A small leaf's view is kept for the next call
(NOTE [Leaves] in cpp/jax2torch/leaves.h). The operands of a later backward pass are imported again
from the saved tensors. Results are buffers that JAX has no more references to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._bridge.handler.extension import requiring_grad
from .._compat.jax import settings, under
from .._compat.torch import (
    asks_for_gradient,
    eager,
    forward_ad_active,
    grad_enabled,
    innermost_is_vmap,
    is_legacy_batched,
    keeps_graph,
    legacy_vmap_level,
    plain_apply,
    saving_is_watched,
    transforms_active,
    unwrap_if_dead,
)
from .programs import Dims, JaxProgram
from .residuals import Facts, Indices
from .transfer import ON_CPU, to_arrays, to_tensors

Tensor = torch.Tensor


class Call:
    """A call is one application of a program: it knows what it is told, and its trace's facts."""

    __slots__ = ("facts", "kept", "n_primals", "program", "settings")
    facts: Facts
    kept: Any
    """A backward pass needs this beside saved tensors; None when it is freed. See ``Direct``."""

    settings: tuple[Any, ...]
    """JAX's settings at the call; the first says whether 64-bit types are on."""

    def __init__(self, program: JaxProgram, settings: tuple[Any, ...], n_primals: int) -> None:
        self.program, self.settings = program, settings
        self.n_primals = n_primals  # the operands after them are cotangents and held values

    def another(self, program: JaxProgram, n_primals: int) -> Call:
        """Return a call of a derived program."""
        return type(self)(program, self.settings, n_primals)

    def run(self, operands: Sequence[Any]) -> Sequence[Tensor]:
        """Return the results, then the residuals."""
        reads = self.program.reads
        if reads is not None:
            n = self.n_primals
            operands = [x if i >= n or i in reads else None for i, x in enumerate(operands)]
        arrays, _, place = to_arrays(operands, self.settings[0])
        if place != ON_CPU:
            self.program.refuse_compiling()
        traced = self.program.jitted(*arrays)
        self.facts = traced.facts
        return to_tensors((*traced.outs, *traced.residuals), traced.facts.dtypes, place)


def apply(program: JaxProgram, operands: Sequence[Any], kind: type[Call] = Call) -> Any:
    """Return the results of a program, and the tree that they are the leaves of."""
    call = kind(program, settings(), len(operands))
    outs = _apply(call, operands)
    facts = call.facts
    return outs[: facts.n_out], facts.tree


def _apply(call: Call, operands: Sequence[Any]) -> Sequence[Tensor]:
    alone = eager()
    if not alone:
        if transforms_active():
            if not innermost_is_vmap():
                _emit(call, tuple(i for i, x in _tensors(operands) if asks_for_gradient(x)))
            return ApplyProgram.apply(call, *operands)  # type: ignore[return-value]
        if legacy_vmap_level() and any(is_legacy_batched(x) for _, x in _tensors(operands)):
            return _apply_rows(call, operands)
        alone = not forward_ad_active()
    asking = requiring_grad(operands) if grad_enabled() else ()
    if asking:
        _emit(call, asking)
        if alone and call.program.is_emission and type(call) is Call and not saving_is_watched():
            return _direct(call, *operands)
    elif alone:
        return call.run(operands)
    return _plain_apply(call, *operands)


def _apply_rows(call: Call, operands: Sequence[Any]) -> Sequence[Tensor]:
    """Apply it in ``is_grads_batched`` and ``vectorize=True``, an older vmap of PyTorch's."""
    level = legacy_vmap_level()
    dims = tuple(0 if is_legacy_batched(x) else None for x in operands)
    rows = [
        x if d is None else torch._remove_batch_dim(x, level, 0, 0)
        for x, d in zip(operands, dims, strict=True)
    ]
    batched = call.another(call.program.batch(dims), call.n_primals)
    results = _apply(batched, rows)[: batched.facts.n_out]
    call.facts = batched.facts
    return [torch._add_batch_dim(x, 0, level) for x in results]


def _tensors(operands: Sequence[Any]) -> list[tuple[int, Tensor]]:
    return [(i, x) for i, x in enumerate(operands) if isinstance(x, Tensor)]


def _emit(call: Call, wrt: Indices) -> None:
    if wrt and call.program.emits:
        call.program = call.program.emission(wrt)


def _as_in_forward(rule: Callable[..., Any], ctx: Any, *args: Any) -> Any:
    """Run a rule under JAX's settings of the forward pass.

    They are settings of a thread, and PyTorch runs the rules of a GPU on a thread of its own.
    """
    with under(ctx.call.settings):
        return rule(ctx, *args)


class ApplyProgram(torch.autograd.Function):
    """``ApplyProgram`` applies any program to tensors. See NOTE [One Function]."""

    @staticmethod
    def forward(call: Call, *operands: Any) -> tuple[Tensor, ...]:
        return tuple(call.run(operands))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *operands = inputs
        n_out = call.facts.n_out
        outs, residuals = output[:n_out], output[n_out:]
        ctx.set_materialize_grads(False)
        ctx.inexact = [_inexact(out) for out in outs]
        ctx.mark_non_differentiable(
            *(out for out, inexact in zip(outs, ctx.inexact, strict=True) if not inexact),
            *residuals,
        )
        # Rows of another level's residuals have a recipe too; it is that level's.
        recipe = call.facts.recipe if call.program.is_emission else None
        ctx.call, ctx.recipe, ctx.n_results = call, recipe, len(output)
        tensors = [x for _, x in _tensors(operands)]
        ctx.others, ctx.n_tensors = _others(operands), len(tensors)
        kept = [outs[i] for i in recipe.kept] if recipe else []
        saved = [*tensors, *kept, *residuals]
        ctx.save_for_backward(*saved)
        if transforms_active() or forward_ad_active():
            ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if settings() != ctx.call.settings:
            return _as_in_forward(ApplyProgram.backward, ctx, *cotangents)
        operands, held = _saved(ctx)
        n, needs = len(operands), ctx.needs_input_grad
        wrt = tuple([i for i in range(n) if needs[i + 1]])
        pairs = enumerate(zip(ctx.inexact, cotangents, strict=False))
        of = tuple([j for j, (inexact, c) in pairs if inexact and c is not None])
        if not (wrt and of):
            return _gradients(n, wrt, ())
        recipe = ctx.recipe if ctx.recipe and set(wrt) <= set(ctx.recipe.wrt) else None
        program = ctx.call.program.pullback(n, wrt, of, recipe)
        args = [*operands, *(cotangents[j] for j in of), *(x.detach() for x in held if recipe)]
        return _gradients(n, wrt, _apply(ctx.call.another(program, n), args))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if settings() != ctx.call.settings:
            return _as_in_forward(ApplyProgram.jvp, ctx, *tangents)
        operands, _ = _saved(ctx)
        n = len(operands)
        given = tangents[1:]
        wrt = tuple(i for i in range(n) if given[i] is not None)
        program = ctx.call.program.pushforward(n, wrt)
        call = ctx.call.another(program, n)
        pushed = iter(_apply(call, [*operands, *(given[i] for i in wrt)])[: sum(ctx.inexact)])
        out: list[Tensor | None] = [next(pushed) if inexact else None for inexact in ctx.inexact]
        return tuple(out + [None] * (ctx.n_results - len(out)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *operands: Any) -> Any:
        dims: Dims = tuple(in_dims[1:])
        program = call.program.batch(dims)
        batched = call.another(program, call.n_primals)
        rows = _apply(batched, operands)
        call.facts = batched.facts
        if batched.program is not program:
            # What was applied below asked for residuals, which stay there.
            rows = rows[: batched.facts.n_out]
        return tuple(rows), (0,) * len(rows)


class Direct(torch.autograd.Function):
    """``Direct`` applies an emission where nothing but autograd looks on. See NOTE [Residuals]."""

    @staticmethod
    def forward(ctx: Any, call: Call, *operands: Any) -> tuple[Tensor, ...]:
        arrays, n_tensors, place = to_arrays(operands, call.settings[0])
        if place != ON_CPU:
            call.program.refuse_compiling()
        traced = call.program.jitted(*arrays)
        call.facts = facts = traced.facts
        results, recipe = traced.outs, facts.recipe
        outs = to_tensors(results, facts.dtypes, place)
        ctx.set_materialize_grads(False)
        if recipe.integers:
            ctx.mark_non_differentiable(*[outs[j] for j in recipe.integers])
        tensors, others = operands, None
        if n_tensors != len(operands):
            tensors = [x for x in operands if isinstance(x, Tensor)]
            others = _others(operands)
        ctx.save_for_backward(*tensors, *map(outs.__getitem__, recipe.kept))
        held = (*map(results.__getitem__, recipe.kept), *traced.residuals)
        call.kept = others, recipe.read(arrays), held, place
        ctx.call = call
        return outs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        if settings() != call.settings:
            return _as_in_forward(Direct.backward, ctx, *cotangents)
        needs, recipe = ctx.needs_input_grad[1:], call.facts.recipe
        n, missing = len(needs), tuple([c is None for c in cotangents])
        program, wrt, of = call.program.asked(needs, missing, recipe)
        if program is None:
            return _gradients(n, wrt, ())
        given = cotangents if len(of) == len(missing) else [cotangents[j] for j in of]
        saved = ctx.saved_tensors  # this raises where one of them is changed, or freed
        others, read, held, place = call.kept
        if grad_enabled() or not eager():
            n_tensors, n_kept = len(saved) - len(recipe.kept), len(recipe.kept)
            operands = _operands(others or [None] * n, saved[:n_tensors])
            kept = [x.detach() for x in saved[n_tensors:]]
            residuals = held[n_kept:]
            dtypes = frozenset(x.dtype for x in residuals)
            kept += to_tensors(residuals, dtypes, place)
            grads = _apply(call.another(program, n), [*operands, *given, *kept])
        else:
            arrays, _, _ = to_arrays(given, call.settings[0])
            if place != ON_CPU:
                program.refuse_compiling()
            traced = program.jitted(*read, *arrays, *held)
            grads = to_tensors(traced.outs, traced.facts.dtypes, place)
        if not keeps_graph():
            call.kept = None  # autograd frees what it saved, too
        return _gradients(n, wrt, grads)


_plain_apply = plain_apply(ApplyProgram)
_direct = plain_apply(Direct)


def _gradients(n: int, wrt: Sequence[int], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return what ``backward`` returns: None for the call, and for what asks for no gradient."""
    if len(wrt) == n == len(grads):
        return None, *grads
    found = dict(zip(wrt, grads, strict=False))  # residuals may follow the gradients
    return None, *(found.get(i) for i in range(n))


def _others(operands: Sequence[Any]) -> list[Any]:
    """Return the operands with None for tensors, which autograd saves."""
    return [None if isinstance(x, Tensor) else x for x in operands]


def _operands(others: Sequence[Any], saved: Sequence[Tensor]) -> list[Any]:
    """Return the operands with the saved tensors in their places."""
    tensors = iter(saved)
    return [next(tensors) if x is None else x for x in others]


def _saved(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """Return the operands, and what a pullback holds beside them."""
    saved = [unwrap_if_dead(x) for x in ctx.saved_tensors]
    return _operands(ctx.others, saved), saved[ctx.n_tensors :]


def _inexact(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()
