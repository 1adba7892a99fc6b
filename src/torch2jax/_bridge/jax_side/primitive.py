"""The primitive is one call of a torch callee. Its rules stand beside it in this folder.

Its parameters are ``callee`` (a ``Callee``), ``results`` (a shape and dtype per output) and
``orders`` (how many derivatives ``depth=`` still allows; None where nothing limits them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ..._compat.jax import Primitive, random_effect, result_aval, torch_effect, varying_together
from ..torch_side.callee import Callee
from .sharded_types import check_whole

_PACKAGE = __name__.partition(".")[0]

torch_call_p = Primitive(f"{_PACKAGE}_call")
torch_call_p.multiple_results = True


TOKEN = ((4,), np.dtype(np.uint32))
"""A token has this shape and dtype: see ``torch_side/tape``."""


def call(
    callee: Callee,
    operands: Sequence[Any],
    results: Sequence[tuple[tuple[int, ...], Any]],
    orders: int | None,
) -> list[Any]:
    """Bind the primitive; ``results`` are (shape, dtype) pairs."""
    return torch_call_p.bind(
        *varying_together(operands),
        callee=callee,
        results=tuple((tuple(shape), np.dtype(dtype)) for shape, dtype in results),
        orders=orders,
    )


@torch_call_p.def_effectful_abstract_eval
def _abstract_eval(
    *avals: Any, callee: Callee, results: Any, orders: int | None
) -> tuple[list[Any], set[Any]]:
    options = callee.options
    check_whole(avals, callee.inputs, options.label)
    effects: set[Any] = {torch_effect} if options.side_effects else set()
    if options.draws:
        effects.add(random_effect)
    return [result_aval(shape, dtype, avals) for shape, dtype in results], effects


@torch_call_p.def_impl
def _impl(*operands: Any, callee: Callee, **params: Any) -> list[Any]:
    # Outside of jit each callee has one jitted call per parameters, which lives as long as it does.
    key = tuple(params.values())
    jitted = callee.jitted.get(key)
    if jitted is None:

        def torch_call(*xs: Any) -> list[Any]:
            return torch_call_p.bind(*xs, callee=callee, **params)

        jitted = callee.jitted[key] = jax.jit(torch_call)
    with jax.disable_jit(False):
        return jitted(*operands)
