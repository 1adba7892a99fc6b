"""Programs of ``torch.export`` have torchax's names here; states are a list in order of names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.export
from torch.export import ExportedProgram
from torch.utils import _pytree as torch_tree

from ..device.exported import Interpreter, extract_exported, input_avals

__all__ = [
    "JaxInterpreter",
    "exported_program_to_jax",
    "exported_program_to_stablehlo",
    "extract_avals",
]


class JaxInterpreter(Interpreter):
    """An interpreter runs a graph of ``torch.fx``, whose operators are of aten, on arrays."""


def exported_program_to_jax(exported_program: ExportedProgram, export_raw: bool = False) -> Any:
    """Turn a program into a JAX function.

    Args:
      exported_program: what ``torch.export.export`` returned.
      export_raw: whether the names of the states come in front.

    Returns:
      ``(states, fn)``: a list of arrays, which are copies of the program's parameters, buffers and
      constants, and ``fn(states, args, kwargs=None)``, which returns a tuple of all results, one
      after the other. With ``export_raw`` it is ``(names, states, fn)``.
    """
    names, states, fn = _listed(exported_program)
    return (names, states, fn) if export_raw else (states, fn)


def extract_avals(exported: ExportedProgram) -> list[Any]:
    """Return shape and dtype of each argument, in the graph's order; dynamic ones are symbolic."""
    return torch_tree.tree_leaves(input_avals(exported))


def exported_program_to_stablehlo(
    exported_program: ExportedProgram,
) -> tuple[list[Any], jax.export.Exported]:
    """Turn a program into StableHLO.

    Returns:
      ``(states, exported)``. ``exported.call(states, args)`` runs it, where ``args`` is a tuple. A
      program with keyword arguments takes ``(states, args, kwargs)``. It returns a tuple of all
      results, one after the other.
    """
    _, states, fn = _listed(exported_program)
    args, kwargs = input_avals(exported_program)
    avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in states]
    given = (avals, args, kwargs) if kwargs else (avals, args)
    return states, jax.export.export(jax.jit(fn))(*given)


def _listed(program: ExportedProgram) -> tuple[list[str], list[Any], Callable[..., Any]]:
    state, inner = extract_exported(program)
    names = list(state)

    def fn(states: Any, args: Any, kwargs: Any = None) -> Any:
        out = inner(dict(zip(names, states, strict=True)), args, kwargs)
        return tuple(torch_tree.tree_leaves(out))

    return names, list(state.values()), fn
