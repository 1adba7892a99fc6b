"""A trace embeds small constants, and makes large ones again inside the program.

NOTE [Constants of a trace].

While a trace is under way, operators of arrays (not tracers) run at once: masks and index tables
are Python values there. A large result that the traced program uses is not embedded in it, but
made again inside from its recipe: the program that made it, its operands as they were, and its
index among the results.

What follows from integers alone whose values a trace may look at (a module's buffer of lengths,
under ``device.jit``) has a recipe, too. It is followed where code asks for values.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.core import Tracer

from ..tensors.tensor import Cell, Tensor, asked, captures, read_cell

__all__ = [
    "asked_sizes",
    "is_large",
    "keep_recipe",
    "keep_recipe_of_sizes",
    "value_of",
]

LARGE = 1 << 20
"""A constant of a trace with more bytes is made again inside the program."""


class Recipe:
    """A recipe tells how a result of a program was made."""

    __slots__ = ("index", "operands", "program")

    def __init__(self, program: Any, operands: list[Any], index: int) -> None:
        self.program, self.index = program, index
        self.operands = [_Operand(x) if type(x) is Tensor else x for x in operands]

    def made(self) -> Any:
        """Make the result again."""
        values = [x.value() if type(x) is _Operand else x for x in self.operands]
        out, _ = self.program.run(*values)
        return jax.tree.leaves(out)[self.index]


class _Operand:
    """An operand is a tensor as it was when it was used."""

    __slots__ = ("array", "cell", "recipe", "view")

    def __init__(self, x: Tensor) -> None:
        cell, chain = x._cell, x._chain
        self.array, self.recipe = cell.array, cell.recipe
        self.view = None if chain is None else chain.operand
        # Memory from before the trace; what the trace makes is not to be kept alive.
        self.cell: Cell | None = None
        if self.recipe is None and isinstance(self.array, Tracer):
            self.cell = cell

    def value(self) -> Any:
        array = self.array if self.recipe is None else self.recipe.made()
        if self.cell is not None:
            for capture in captures:
                array = capture.known_array(self.cell, array)
        return array if self.view is None else self.view(array)


def keep_recipe(made: list[Tensor], program: Any, operands: list[Any]) -> None:
    """Note how those results of a program were made that are too large to embed."""
    for index, t in enumerate(made):
        if t._cell.array.nbytes > LARGE:
            t._cell.recipe = Recipe(program, operands, index)


def keep_recipe_of_sizes(made: list[Tensor], program: Any, operands: list[Any]) -> None:
    """Note how traced results were made that follow from integers which a trace may look at."""
    if program.route.random:
        return
    tensors = [x for x in operands if type(x) is Tensor]
    if tensors and all(map(_has_values, tensors)):
        for index, t in enumerate(made):
            if isinstance(t._cell.array, Tracer):
                t._cell.recipe = Recipe(program, operands, index)


def _has_values(x: Tensor) -> bool:
    cell = x._cell
    if cell.recipe is not None or not isinstance(cell.array, Tracer):
        return True
    if x.dtype.is_floating_point or x.dtype.is_complex:  # weights, which change all the time
        return False
    return any(capture.has_values(cell) for capture in captures)


def asked_sizes(operands: list[Any]) -> list[Any] | None:
    """Return operands with the values of their tensors, where all follow from such integers.

    Return None where one has no values yet.
    """
    tensors = [x for x in operands if type(x) is Tensor]
    if not all(map(_has_values, tensors)):
        return None
    values = [asked(x) if type(x) is Tensor else x for x in operands]
    return None if any(x is None for x in values) else values


def is_large(program: Any, numbers: list[Any]) -> bool:
    """Say whether what an operator makes of numbers alone is too large to embed."""
    out, _ = jax.eval_shape(program.run, *numbers)
    return any(x.size * x.dtype.itemsize > LARGE for x in jax.tree.leaves(out))


def value_of(t: Tensor) -> Any:
    """Return the values of a tensor as an operand of a traced operator."""
    cell = t._cell
    if cell.recipe is None or isinstance(cell.array, Tracer):
        return read_cell(t, cell.array)
    made = cell.recipe.made()
    return made if t._chain is None else t._chain.get(made)
