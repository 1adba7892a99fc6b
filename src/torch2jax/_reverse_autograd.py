"""Programs of JAX applied to tensors, with PyTorch's autograd and ``torch.func`` above them.

NOTE [One Function]. ``Apply`` applies any program; its derivatives and batches apply derived
programs, by ``Apply`` again wherever something may differentiate or batch them further. So every
composition of transforms, to any order, is a chain of such applications.

NOTE [Residuals]. An application that a gradient is asked of runs the program's emission. The
residuals are further results of it, without derivatives, and are saved like all tensors: hooks
(``torch.utils.checkpoint``, ``save_on_cpu``) see them, operands and results among them keep
PyTorch's version check, and a backward pass frees them.

NOTE [Memory]. An operand is a view of a tensor for the length of the call: on a CPU the results are
computed when it returns, so the tensor may be written to from then on. The operands of a later
backward pass are imported again from the saved tensors. Results are buffers that JAX has no more
references to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._compat import precision
from ._convert import x64_enabled
from ._jax_program import Dims, Emission, Plan, Program
from ._torch_compat import (
    asks_for_gradient,
    forward_ad_active,
    innermost_is_vmap,
    is_legacy_batched,
    legacy_vmap_level,
    plain_apply,
    transforms_active,
    unwrap_if_dead,
)
from ._transfer import to_arrays, to_tensors

Tensor = torch.Tensor


class Call:
    """One application of a program: what it is told, and what its trace tells."""

    __slots__ = ("n_out", "n_primals", "plan", "program", "tree", "x64")

    def __init__(self, program: Program, x64: bool, n_primals: int) -> None:
        self.program, self.x64 = program, x64
        self.n_primals = n_primals  # the operands after them are cotangents and held values
        self.n_out = 0
        self.tree: Any = None
        self.plan: Plan | None = None

    def run(self, operands: Sequence[Any]) -> list[Tensor]:
        """Results, then residuals."""
        if x64_enabled() is not self.x64:
            with precision(self.x64):  # a thread of PyTorch's own runs this backward pass
                return self.run(operands)
        program = self.program
        tensors = [x for x in operands if isinstance(x, Tensor)]
        arrays = to_arrays(operands, program.reads, self.n_primals)
        traced = program.jitted(*arrays)
        self.n_out, self.tree, self.plan = len(traced.outs), traced.facts.tree, traced.facts.plan
        on_cpu = bool(tensors) and all(x.is_cpu for x in tensors)
        return to_tensors([*traced.outs, *traced.residuals], on_cpu)


def apply(program: Program, operands: Sequence[Any], n_primals: int | None = None) -> Any:
    """The results of a program, and the tree that they are the leaves of.

    ``n_primals``: how many of the operands ``program.reads`` speaks of.
    """
    call = Call(program, x64_enabled(), len(operands) if n_primals is None else n_primals)
    outs = _apply(call, operands)
    return outs[: call.n_out], call.tree


def _apply(call: Call, operands: Sequence[Any]) -> Sequence[Tensor]:
    if transforms_active():
        if not innermost_is_vmap():
            _emit(call, [i for i, x in _tensors(operands) if asks_for_gradient(x)])
        return Apply.apply(call, *operands)  # type: ignore[return-value]
    if legacy_vmap_level() and any(is_legacy_batched(x) for _, x in _tensors(operands)):
        return _apply_rows(call, operands)
    asking = [i for i, x in _tensors(operands) if x.requires_grad]
    if asking and torch.is_grad_enabled():
        _emit(call, asking)
    elif not forward_ad_active():
        return call.run(operands)
    return _plain_apply(call, *operands)


def _apply_rows(call: Call, operands: Sequence[Any]) -> Sequence[Tensor]:
    """Inside ``is_grads_batched`` and ``vectorize=True``, which are not ``torch.func``'s vmap."""
    level = legacy_vmap_level()
    dims = tuple(0 if is_legacy_batched(x) else None for x in operands)
    rows = [
        x if d is None else torch._remove_batch_dim(x, level, 0, 0)
        for x, d in zip(operands, dims, strict=True)
    ]
    batched = Call(call.program.batch(dims), call.x64, call.n_primals)
    results = _apply(batched, rows)[: batched.n_out]
    call.n_out, call.tree = batched.n_out, batched.tree
    return [torch._add_batch_dim(x, 0, level) for x in results]


def _tensors(operands: Sequence[Any]) -> list[tuple[int, Tensor]]:
    return [(i, x) for i, x in enumerate(operands) if isinstance(x, Tensor)]


def _emit(call: Call, wrt: list[int]) -> None:
    if wrt and call.program.emits:
        call.program = call.program.emission(tuple(wrt))


class Apply(torch.autograd.Function):
    """See NOTE [One Function]."""

    @staticmethod
    def forward(call: Call, *operands: Any) -> tuple[Tensor, ...]:
        return tuple(call.run(operands))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *operands = inputs
        outs, residuals = output[: call.n_out], output[call.n_out :]
        ctx.set_materialize_grads(False)
        ctx.inexact = [_inexact(out) for out in outs]
        ctx.mark_non_differentiable(
            *(out for out, inexact in zip(outs, ctx.inexact, strict=True) if not inexact),
            *residuals,
        )
        # Rows of another level's residuals have a plan too; it is that level's.
        plan = call.plan if isinstance(call.program, Emission) else None
        ctx.call, ctx.plan, ctx.n_results = call, plan, len(output)
        ctx.places = [i for i, _ in _tensors(operands)]
        ctx.others = [None if isinstance(x, Tensor) else x for x in operands]
        kept = [outs[i] for i in plan.kept] if plan else []
        saved = [*(operands[i] for i in ctx.places), *kept, *residuals]
        ctx.save_for_backward(*saved)
        if transforms_active() or forward_ad_active():
            ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        operands, held = _saved(ctx)
        n = len(operands)
        grads: list[Tensor | None] = [None] * n
        wrt = tuple(i for i in range(n) if ctx.needs_input_grad[1 + i])
        of = tuple(
            j for j, inexact in enumerate(ctx.inexact) if inexact and cotangents[j] is not None
        )
        if wrt and of:
            plan = ctx.plan if ctx.plan and set(wrt) <= set(ctx.plan.wrt) else None
            program = ctx.call.program.pullback(n, wrt, of, plan)
            args = [*operands, *(cotangents[j] for j in of), *(held if plan else ())]
            call = Call(program, ctx.call.x64, n)
            for i, grad in zip(wrt, _apply(call, args), strict=False):
                grads[i] = grad
        return None, *grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        operands, _ = _saved(ctx)
        n = len(operands)
        given = tangents[1:]
        wrt = tuple(i for i in range(n) if given[i] is not None)
        program = ctx.call.program.pushforward(n, wrt)
        call = Call(program, ctx.call.x64, n)
        pushed = iter(_apply(call, [*operands, *(given[i] for i in wrt)])[: sum(ctx.inexact)])
        out: list[Tensor | None] = [next(pushed) if inexact else None for inexact in ctx.inexact]
        return tuple(out + [None] * (ctx.n_results - len(out)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Call, *operands: Any) -> Any:
        dims: Dims = tuple(in_dims[1:])
        program = call.program.batch(dims)
        batched = Call(program, call.x64, call.n_primals)
        rows = _apply(batched, operands)
        call.n_out, call.tree = batched.n_out, batched.tree
        if batched.program is program:
            call.plan = batched.plan
        else:  # residuals were asked for below, and stay there
            rows = rows[: batched.n_out]
        return tuple(rows), (0,) * len(rows)


_plain_apply = plain_apply(Apply)


def _saved(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """The operands, and what a pullback holds beside them."""
    saved = [unwrap_if_dead(x) for x in ctx.saved_tensors]
    operands = list(ctx.others)
    for i, x in zip(ctx.places, saved, strict=False):
        operands[i] = x
    return operands, saved[len(ctx.places) :]


def _inexact(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()
