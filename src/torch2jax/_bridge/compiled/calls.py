"""A compiled forward call returns residuals, and a backward call takes them.

They take the place of the tape's token (see ``torch_side.tape.calls``). Like the token they are
constants to derivatives: a derivative of a backward call is that of the whole pullback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..._conversions.dtypes import dtype_j2t, dtype_t2j
from ..torch_side.callee import Callee
from ..torch_side.derivatives import Program, Vjp, Vmap
from ..torch_side.gradients import Dims, Indices
from ..torch_side.inference import Spec
from ..torch_side.tape.calls import keepable, untaped
from .libraries import surroundings
from .splitting import BackwardPart, ForwardPart, Split, WithoutResiduals, split

Avals = Sequence[tuple[tuple[int, ...], Any]]


def splitting(callee: Callee, wrt: Indices, of: Indices, avals: Avals) -> Callee | None:
    """Return ``x -> (outputs, residuals)``; None where PyTorch cannot split the function."""
    if not keepable(callee) or callee.residuals:
        return None
    where = ",".join(map(str, wrt)) + ";" + ",".join(map(str, of))
    shapes = ",".join(f"{np.dtype(d)}{list(shape)}" for shape, d in avals)
    suffix = f"/forward({where}|{shapes})"
    found = callee.splits.get(suffix, False)
    if found is False:
        specs = [Spec(shape, dtype_j2t(d), callee.options.device) for shape, d in avals]
        found = split(callee.program, specs, wrt, of, surroundings(callee))
        callee.splits[suffix] = found
    return None if found is None else _forward(callee, suffix, found)


def _forward(callee: Callee, suffix: str, parts: Split) -> Callee:
    residuals = tuple((shape, np.dtype(dtype_t2j(dtype))) for shape, dtype in parts.residuals)
    names = [f"residual {i}" for i in range(len(residuals))]
    return callee.derive(
        suffix,
        lambda: ForwardPart(callee.program, parts),
        callee.inputs,
        [*callee.outputs, *names],
        plain=callee,
        residuals=residuals,
    )


def with_residuals(callee: Callee, after: int, keep: Callee) -> Callee:
    """Give a derivative, ``callee``, residuals of ``keep`` before its last ``after`` operands."""
    at, count = len(callee.inputs) - after, len(keep.residuals)
    program: Any = callee.program

    def make() -> Program:
        part: Any = keep.program
        if isinstance(program, Vjp) and isinstance(part, ForwardPart):
            known = part.split
            if set(program.wrt) <= set(known.wrt) and set(program.of) <= set(known.of):
                return BackwardPart(program, known, program.wrt, program.of)
        return WithoutResiduals(program, at, count)

    names = [f"residual {i}" for i in range(count)]
    inputs = [*callee.inputs[:at], *names, *callee.inputs[at:]]
    suffix = f"/residuals({keep.suffix})"
    return callee.derive(
        suffix,
        make,
        inputs,
        callee.outputs,
        token_at=at,
        keep=keep,
        tokens=count,
        plain=callee,
    )


def on_rows(callee: Callee, dims: Dims) -> Callee:
    """Return a callee that returns or takes residuals on rows; all its results have rows."""
    plain = untaped(callee).vmap(tuple(callee.without_token(dims)))
    suffix = f"/rows({','.join(map(str, dims))}{callee.path})"
    return plain.derive(
        suffix,
        lambda: Vmap(callee.program, dims),
        callee.inputs,
        callee.outputs,
        token_at=callee.token_at,
        keep=callee.keep,
        tokens=callee.tokens,
        plain=plain,
        residuals=callee.residuals,
        inner=callee,
    )


def transposed_like(transposed: Callee, after: int, callee: Callee) -> Callee:
    """Give ``transposed``, the transpose of ``callee`` without residuals, those of ``callee``."""
    if callee.inner is None:
        assert callee.keep is not None
        return with_residuals(transposed, after, callee.keep)
    assert transposed.parent is not None
    assert callee.token_at is not None
    single = transposed_like(transposed.parent, after, callee.inner)
    dims, own = transposed.program.dims, callee.program.dims
    at, start = len(dims) - after, callee.token_at
    return on_rows(single, (*dims[:at], *own[start : start + callee.tokens], *dims[at:]))
