"""A call is lowered to one custom call, whose attribute is the name of the callee.

On a GPU the host waits for tokens and keys. So a call there has numbers too, by which the handler
need not wait for all that is queued: ``site``, see ``torch_side/tape/sites.py``, and ``key``, see
``cpp/handler/prefetch.h``. Exported programs go without.

On platforms without a handler it becomes a callback of JAX's: see ``handler/host_callback.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters import mlir

from ..._compat.jax import called, device_count, lowered_so_far, maker_of, register_lowering
from ..._refusals import refuse_symbolic
from ..handler import entries, extension
from ..handler.host_callback import call_on_host
from ..torch_side.callee import Callee
from ..torch_side.tape.calls import returns_token
from .exporting import exported_name
from .primitive import torch_call_p


def _lower(
    ctx: mlir.LoweringRuleContext,
    *operands: Any,
    callee: Callee,
    results: Any,
    orders: int | None,
    gpu: bool,
) -> Sequence[Any]:
    avals: list[Any] = [*ctx.avals_in, *ctx.avals_out]
    for a in avals:
        refuse_symbolic(a.shape, f"an operand or a result of {callee.options.label}")
    if callee.options.compiled:
        return _lower_compiled(ctx, operands, callee)
    several = device_count(ctx) > 1
    numbers: dict[str, np.int64] = {}
    if ctx.module_context.lowering_parameters.for_export:
        name = exported_name(callee, ctx.avals_in, several)
    else:
        name = entries.register(callee, several).name
        ctx.module_context.add_keepalive(callee)
        if gpu:
            operands, numbers = _numbered(ctx, operands, callee, several)
    is_root = callee.parent is None
    lower = jax.ffi.ffi_lowering(
        extension.TARGET,
        has_side_effect=callee.options.side_effects or callee.options.draws,
        operand_output_aliases=dict(callee.options.aliases) if is_root else {},
    )
    with called(ctx, callee.shown):
        return lower(ctx, *operands, name=name, **numbers)


def _lower_compiled(
    ctx: mlir.LoweringRuleContext, operands: Sequence[Any], callee: Callee
) -> Sequence[Any]:
    from ..compiled.libraries import library_of  # PyTorch's compiler takes seconds to load

    avals, results = list[Any](ctx.avals_in), list[Any](ctx.avals_out)
    library = library_of(callee, [(tuple(x.shape), x.dtype) for x in avals])
    library.check([(tuple(x.shape), x.dtype) for x in results])
    held = [mlir.ir_constant(x) for x in library.constants]
    inner = ctx.replace(avals_in=[*avals, *map(jax.typeof, library.constants)])
    lower = jax.ffi.ffi_lowering(extension.COMPILED)
    return lower(inner, *operands, *held, name=library.name)


def _numbered(
    ctx: mlir.LoweringRuleContext, operands: tuple[Any, ...], callee: Callee, several: bool
) -> tuple[tuple[Any, ...], dict[str, np.int64]]:
    """Return the operands, a key by way of its prefetch, and the call's ``site`` and ``key``."""
    number = lowered_so_far(ctx)  # no other call in the program has it
    if returns_token(callee):
        site = number
    elif callee.token_at is not None:
        site = maker_of(operands[callee.token_at], extension.TARGET).get("site", 0)
    else:
        site = 0
    numbers = {"site": np.int64(site)} if site else {}
    at, avals = callee.options.rng, list[Any](ctx.avals_in)
    # A backward call seldom needs the key, and rows have keys of their own.
    if at is None or callee.token_at is not None or several or avals[at].ndim != 1:
        return operands, numbers
    inner = ctx.replace(avals_in=[avals[at]], avals_out=[avals[at]])
    (words,) = jax.ffi.ffi_lowering(extension.PREFETCH)(inner, operands[at], site=np.int64(number))
    return (*operands[:at], words, *operands[at + 1 :]), {**numbers, "key": np.int64(number)}


lower_on_host = mlir.lower_fun(call_on_host, multiple_results=True)


def lower_for_handlers() -> None:
    """Let calls on each platform for which the extension has a handler go to that handler."""
    for platform in extension.PLATFORMS:
        rule = functools.partial(_lower, gpu=platform != "cpu")
        register_lowering(torch_call_p, rule, platform=platform)


register_lowering(torch_call_p, lower_on_host)
lower_for_handlers()
