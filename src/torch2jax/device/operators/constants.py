"""A trace embeds small constants, and makes large ones again inside the program.

NOTE [Constants of a trace].

While a trace is under way, operators of arrays (not tracers) run at once: masks and index tables
are Python values there. A large result that the traced program uses is not embedded in it, but
made again inside from its recipe: the program that made it, its operands as they were, and its
index among the results.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.core import Tracer

from ..tensors.tensor import Tensor, read_cell

__all__ = ["is_large", "keep_recipe", "value_of"]

LARGE = 1 << 20
"""A constant of a trace with more bytes is made again inside the program."""


def keep_recipe(made: list[Tensor], program: Any, operands: list[Any]) -> None:
    """Note how those results of a program were made that are too large to embed."""
    for index, t in enumerate(made):
        if t._cell.array.nbytes > LARGE:
            t._cell.recipe = (program, [_snapshot(x) for x in operands], index)


def is_large(program: Any, numbers: list[Any]) -> bool:
    """Say whether what an operator makes of numbers alone is too large to embed."""
    out, _ = jax.eval_shape(program.run, *numbers)
    return any(x.size * x.dtype.itemsize > LARGE for x in jax.tree.leaves(out))


def _snapshot(x: Any) -> Any:
    """Return an operand as it is now."""
    if type(x) is not Tensor:
        return x
    chain = x._chain
    return x._cell.array, x._cell.recipe, None if chain is None else chain.operand


def value_of(t: Tensor) -> Any:
    """Return the values of a tensor as an operand of a traced operator."""
    cell = t._cell
    if cell.recipe is None or isinstance(cell.array, Tracer):
        return read_cell(t, cell.array)
    made = _made(cell.recipe)
    return made if t._chain is None else t._chain.get(made)


def _made(recipe: Any) -> Any:
    """Compute a large constant inside the program that is being traced."""
    program, operands, index = recipe
    arrays = []
    for x in operands:
        if isinstance(x, tuple):
            array, inner, operand = x
            array = array if inner is None else _made(inner)
            arrays.append(array if operand is None else operand(array))
        else:
            arrays.append(x)
    out, _ = program.run(*arrays)
    return jax.tree.leaves(out)[index]
