"""A callee has a library for each set of operands, which XLA calls by name."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..._conversions.convert import t2j
from ..._conversions.dtypes import dtype_j2t, dtype_t2j
from ..._errors import Torch2JaxError
from ..handler import extension
from ..torch_side.callee import Callee
from ..torch_side.derivatives import UserProgram
from ..torch_side.inference import Spec
from ..torch_side.modules import loans
from ..torch_side.normalizations import in_parts
from . import building, cache
from .graphs import Graph, Surroundings, carried, trace

Avals = Sequence[tuple[tuple[int, ...], Any]]


@dataclass(frozen=True, eq=False)
class Library:
    """A library is loaded in this process; programs call it by its name."""

    name: str
    label: str
    path: Path
    constants: tuple[np.ndarray, ...]
    """The last operands of each call."""
    results: tuple[Spec, ...]

    def check(self, expected: Avals) -> None:
        """Raise where the graph's results are others than the call's."""
        found = [(s.shape, np.dtype(dtype_t2j(s.dtype))) for s in self.results]
        if found != [(tuple(shape), np.dtype(dtype)) for shape, dtype in expected]:
            raise Torch2JaxError(
                f"{self.label} returns {_described(found)} when it is compiled, and "
                f"{_described(expected)} was expected: does output_shapes= fit, and does it return "
                "the same at each call?"
            )


_lock = threading.RLock()
_loaded: dict[str, Path] = {}
"""Paths of the libraries of this process, by name."""


def library_of(callee: Callee, avals: Avals) -> Library:
    """Return the library of a callee for operands of these avals; it is loaded."""
    key = (*((shape, np.dtype(dtype)) for shape, dtype in avals),)
    with _lock:
        found = callee.libraries.get(key)
        if found is None:
            found = callee.libraries[key] = _load(callee, graph_of(callee, avals))
    return found


def graph_of(callee: Callee, avals: Avals) -> Graph:
    """Return what a callee does on operands of these avals, as a graph."""
    program, options = callee.program, callee.options
    # ``run`` of the user's function may look at values, such as the range of integers.
    user = isinstance(program, UserProgram)
    run = program.functional if user else in_parts(program, program.run)
    specs = [Spec(shape, dtype_j2t(dtype), options.device) for shape, dtype in avals]
    with jax.ensure_compile_time_eval():  # fn may call JAX, on values
        return trace(loans.scoped(run) if options.borrows else run, specs, surroundings(callee))


def surroundings(callee: Callee) -> Surroundings:
    """Return the surroundings in which a callee is traced."""
    options = callee.options
    return Surroundings(described(callee), options.default_dtype, options.roots, options.rng)


def described(callee: Callee) -> str:
    """Return the user's function and what is derived from it, for messages."""
    path, before = callee.path, None
    while path != before:  # innermost parentheses first
        path, before = re.sub(r"\([^()]*\)", "", path), path
    return callee.options.label + path.replace("/", ", ").replace("residuals", "backward")


def _load(callee: Callee, graph: Graph) -> Library:
    label = described(callee)
    name = building.digest_of(graph)
    if name not in _loaded:
        record = {"label": label, **building.surroundings()}
        path = cache.library(name, lambda path: building.build(graph, path, label), record)
        load(name, path)
    constants = tuple(np.asarray(t2j(carried(t).contiguous())) for t in graph.constants)
    return Library(name, label, _loaded[name], constants, graph.results)


def load(name: str, path: Path) -> None:
    """Load a library, whose bytes have been checked."""
    try:
        extension.load_library(name, str(path))
    except RuntimeError as error:
        raise Torch2JaxError(
            f"the compiled library {path.name} cannot be loaded: {error}"
        ) from None
    _loaded[name] = path


def loaded(name: str) -> Path | None:
    """Return the path of a library of this process, or None."""
    return _loaded.get(name)


def _described(avals: Avals) -> str:
    return ", ".join(f"{np.dtype(d)}[{','.join(map(str, s))}]" for s, d in avals) or "nothing"
