"""A differentiated call keeps residuals, and its pullback is put together from them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

Indices = tuple[int, ...]


class Facts:
    """A call returns these beside its arrays, as static; each equals itself alone."""

    n_out: int
    """How many results there are; residuals follow them."""

    dtypes: frozenset[Any]
    """The dtypes of results and residuals."""

    def __init__(self, tree: Any = None, recipe: PullbackRecipe | None = None) -> None:
        self.tree, self.recipe = tree, recipe


class Traced:
    """``jit`` returns results and residuals together with the facts of their trace, as static."""

    __slots__ = ("facts", "outs", "residuals")

    def __init__(self, outs: Sequence[Any], residuals: Sequence[Any], facts: Facts) -> None:
        self.outs, self.residuals, self.facts = outs, residuals, facts


def unflatten(facts: Facts, children: Any, make: Any = object.__new__) -> Traced:
    # It runs at every call, and __init__ would be a second function of Python.
    traced = make(Traced)
    traced.outs, traced.residuals = children
    traced.facts = facts
    return traced


class PullbackRecipe:
    """A recipe puts a pullback together: a leaf is an operand, a held value or a constant.

    Residuals that are operands or results of the forward program are not returned a second time:
    whoever calls it has them. *Held* are first the results at ``kept``, then the new residuals.
    """

    def __init__(self, wrt: Indices, primals: Sequence[Any], traced: Traced, pull: Any) -> None:
        self.wrt = wrt
        self.facts = traced.facts
        self.avals = [(out.shape, out.dtype) for out in traced.outs]
        leaves, self.treedef = jax.tree.flatten(pull)
        self.constants: list[Any] = []
        self.residuals: list[Any] = []  # the emission takes these tracers out, once
        found: dict[int, tuple[str, int]] = {}
        for kind, values in (("operand", primals), ("out", traced.outs)):
            for i, x in enumerate(values):
                found.setdefault(id(x), (kind, i))
        for leaf in leaves:
            kind, values = (
                ("residual", self.residuals)
                if isinstance(leaf, Tracer)
                else ("constant", self.constants)
            )
            if id(leaf) not in found:
                found[id(leaf)] = (kind, len(values))
                values.append(leaf)
        sources = [found[id(leaf)] for leaf in leaves]
        self.kept = tuple(sorted({i for kind, i in sources if kind == "out"}))
        n_kept = len(self.kept)
        place = {
            "operand": lambda i: ("operand", i),
            "constant": lambda i: ("constant", i),
            "out": lambda i: ("held", self.kept.index(i)),
            "residual": lambda i: ("held", n_kept + i),
        }
        self.sources = [place[kind](i) for kind, i in sources]
        self.reads = frozenset(i for kind, i in self.sources if kind == "operand")
        self.reads_all = len(self.reads) == len(primals)
        self.integers = [
            j for j, (_, dtype) in enumerate(self.avals) if not jnp.issubdtype(dtype, jnp.inexact)
        ]

    def read(self, operands: list[Any]) -> list[Any]:
        """Return the operands that the pullback reads; None for the others."""
        if self.reads_all:
            return operands
        return [x if i in self.reads else None for i, x in enumerate(operands)]

    def pull(self, operands: Sequence[Any], held: Sequence[Any]) -> Any:
        """Return the pullback, made of the values that the recipe names."""
        values = {"operand": operands, "held": held, "constant": self.constants}
        return jax.tree.unflatten(self.treedef, [values[kind][i] for kind, i in self.sources])
