"""A call is lowered to one custom call, whose only attribute is the name of the callee.

On platforms without a handler it becomes a callback of JAX's: see ``handler/host_callback.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.interpreters import mlir

from ..._compat.jax import device_count
from ..._refusals import refuse_symbolic
from ..handler import entries, extension
from ..handler.host_callback import call_on_host
from ..torch_side.callee import Callee
from .exporting import exported_name
from .primitive import torch_call_p


def _lower(
    ctx: mlir.LoweringRuleContext,
    *operands: Any,
    callee: Callee,
    results: Any,
    orders: int | None,
) -> Sequence[Any]:
    avals: list[Any] = [*ctx.avals_in, *ctx.avals_out]
    for a in avals:
        refuse_symbolic(a.shape, f"an operand or a result of {callee.options.label}")
    several = device_count(ctx) > 1
    if ctx.module_context.lowering_parameters.for_export:
        name = exported_name(callee, ctx.avals_in, several)
    else:
        name = entries.register(callee, several).name
        ctx.module_context.add_keepalive(callee)
    is_root = callee.parent is None
    lower = jax.ffi.ffi_lowering(
        extension.TARGET,
        has_side_effect=callee.options.side_effects or callee.options.draws,
        operand_output_aliases=dict(callee.options.aliases) if is_root else {},
    )
    return lower(ctx, *operands, name=name)


lower_on_host = mlir.lower_fun(call_on_host, multiple_results=True)

mlir.register_lowering(torch_call_p, lower_on_host)
for _platform in extension.PLATFORMS:
    mlir.register_lowering(torch_call_p, _lower, platform=_platform)
