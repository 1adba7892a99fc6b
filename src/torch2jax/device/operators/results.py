"""An operator's results become tensors, and the cells it has written to get their new arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import torch

from ..._compat.jax import ArrayImpl
from ..tensors.tensor import Tensor, captures, replace, wrap
from .constants import keep_recipe, keep_recipe_of_sizes
from .program import OperatorProgram

__all__ = ["of_arrays", "of_cells"]


def of_cells(
    program: OperatorProgram, operands: list[Any], out: Any, cells: list[Any], recipes: bool
) -> Any:
    """Return the result of a compiled program, and put new arrays into the cells it writes to.

    With ``recipes`` a trace is under way, and it is noted how large results were made.
    """
    for slot, array in zip(program.mutated, cells, strict=True):
        x = operands[slot]
        if x._chain is None and slot in program.outs:
            replace(x, array)
        else:
            x._cell.renew(array)
    made: list[Tensor] = []
    result = _returned(program, operands, out, made)
    if recipes and not cells:
        keep_recipe(made, program, operands)
    return result


def of_arrays(program: OperatorProgram, operands: list[Any], out: Any, new: list[Any]) -> Any:
    """Return the result of ``compute``, and write its ``new`` values to the operands."""
    for slot, value in zip(program.mutated, new, strict=True):
        replace(operands[slot], value)
    made: list[Tensor] = []
    result = _returned(program, operands, out, made)
    if captures and not program.mutated:
        keep_recipe_of_sizes(made, program, operands)
    return result


def _returned(program: OperatorProgram, operands: list[Any], out: Any, made: list[Tensor]) -> Any:
    """Return the operator's return value, and append new tensors to ``made``."""
    route = program.route
    if program.mutated:
        n = route.returns
        if not n:
            return None
        if route.returns_mutated:  # it returns the first operands that it writes to
            found = [operands[slot] for slot in program.mutated]
            return found[0] if n == 1 else tuple(found[:n])
    return _tensors(out, program.torch_dtypes, made)


def _tensors(out: Any, dtypes: Sequence[torch.dtype], made: list[Tensor]) -> Any:
    """Return results as tensors, in the structure in which they come."""
    if out is None:
        return None
    if isinstance(out, list | tuple):
        found = [_tensors(x, dtypes, made) for x in out]
        return found if type(out) is list else tuple(found)
    if type(out) is not ArrayImpl and not isinstance(out, jax.Array):
        out = jax.numpy.asarray(out)
    made.append(wrap(out, dtypes[min(len(made), len(dtypes) - 1)]))
    return made[-1]
