"""``vmap`` of a call is one call of a batched callee, or a loop.

``vmap_method`` decides, with the names and meaning that ``jax.pure_callback`` gives them:

    auto                 ``torch`` where torch can batch the function, else ``sequential``
    torch                one call through ``torch.func.vmap``
    sequential           ``jax.lax.map`` over single calls; ``sequential_unrolled`` unrolls it
    expand_dims          the function batches by itself: unbatched operands get a leading dim of 1
    broadcast_all        the same; unbatched operands are broadcast to the batch
    legacy_vectorized    the same; unbatched operands are passed as they are

Rows with keys of their own (``rng=``) run one after the other inside one call, whatever the method.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.interpreters import batching

from ..._conversions.dtypes import dtype_j2t
from ..._errors import Torch2JaxError, Torch2JaxWarning
from ..._refusals import refuse_symbolic
from ..compiled.calls import on_rows
from ..torch_side.callee import Callee
from ..torch_side.inference import Spec, runs_on_fakes
from ..torch_side.normalizations import in_parts
from ..torch_side.tape.calls import (
    is_vjp,
    keeping,
    kept_operands,
    returns_token,
    untaped,
    with_token,
)
from .primitive import TOKEN, call, torch_call_p

VmapMethod = Literal[
    "auto",
    "torch",
    "sequential",
    "sequential_unrolled",
    "expand_dims",
    "broadcast_all",
    "legacy_vectorized",
]
METHODS = get_args(VmapMethod)


def _batch(
    operands: Sequence[Any],
    dims: Sequence[int | None],
    *,
    callee: Callee,
    results: Any,
    orders: int | None,
) -> tuple[list[Any], list[int | None]]:
    """Batch a call of ``f``, which may return a token, or take one.

    A token that is returned has rows where the rows have graphs of their own. Otherwise it has
    none: it is the token of one graph for all rows, or says that nothing is kept.
    """
    if callee.options.compiled and callee.plain is not None:
        return _batch_with_residuals(callee, operands, dims, results, orders)
    f, keeps = untaped(callee), returns_token(callee)
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    rows = [((size, *shape), dtype) for shape, dtype in (results[:-1] if keeps else results)]
    out_dims: list[int | None] = [0] * len(rows)
    inner, inner_dims = _with_own_rows(
        f, callee.without_token(operands), callee.without_token(dims), size
    )
    if size == 0:
        method = "none"
    elif callee.token_at is not None and dims[callee.token_at] is not None:
        method = "sequential"  # the graphs are those of single rows
    else:
        method = _choose(f, inner, inner_dims)
    if method.startswith("sequential"):
        unroll = method == "sequential_unrolled"
        out = _loop(callee, operands, dims, results, orders, unroll)
        return out, [0] * len(out)
    if method == "none":
        out = [jnp.zeros(*row) for row in rows]
    elif method not in ("torch", "rows"):
        out = call(f, _for_own_batching(method, f, inner, inner_dims, size), rows, orders)
    elif callee.token_at is not None:
        out = _batch_with_token(callee, operands[callee.token_at], inner, inner_dims, rows, orders)
    elif keeps and all(inner_dims[i] is not None for i in kept_operands(callee)):
        # The gradient of an operand without rows would come out summed.
        keep = keeping(_batched(f, _rows_first(inner_dims)), kept_operands(callee))
        return call(keep, _front(inner, inner_dims), (*rows, TOKEN), orders), [*out_dims, None]
    else:
        out = call(_batched(f, inner_dims), inner, rows, orders)
    if keeps:  # nothing is kept
        return [*out, jnp.zeros(*TOKEN)], [*out_dims, None]
    return out, out_dims


def _batch_with_residuals(
    callee: Callee,
    operands: Sequence[Any],
    dims: Sequence[int | None],
    results: Any,
    orders: int | None,
) -> tuple[list[Any], list[int | None]]:
    """Batch a compiled call that returns residuals, or takes them; all of its results get rows."""
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    rows = [((size, *shape), dtype) for shape, dtype in results]
    plain = untaped(callee)
    if size == 0:
        out = [jnp.zeros(*row) for row in rows]
    elif _choose(plain, callee.without_token(operands), callee.without_token(dims)) == "torch":
        out = call(on_rows(callee, tuple(dims)), operands, rows, orders)
    else:
        out = _loop(callee, operands, dims, results, orders, unroll=False)
    return out, [0] * len(out)


def _batch_with_token(
    callee: Callee,
    token: Any,
    operands: Sequence[Any],
    dims: Sequence[int | None],
    rows: Sequence[Any],
    orders: int | None,
) -> list[Any]:
    """Batch a derivative that takes the token of one graph for all rows.

    ``operands`` and ``dims`` are those without the token.
    """
    f, keep, at = untaped(callee), callee.keep, callee.token_at
    assert keep is not None
    front, dims = _front(operands, dims), _rows_first(dims)
    seeds = len(front[at:])
    if is_vjp(f):
        # Every cotangent gets rows, so that one backward pass serves them all.
        size = rows[0][0][0]
        front[at:] = _everywhere(front[at:], dims[at:], size)
        dims = (*dims[:at], *(0,) * seeds)
    if is_vjp(f) and all(dims[i] is not None for i in kept_operands(keep)):
        assert f.parent is not None
        batched = _batched(f.parent, dims[:at])
        pullback = batched.vjp(f.program.wrt, f.program.of)
        derived = with_token(pullback, seeds, keeping(batched, kept_operands(keep)))
    else:
        derived = with_token(_batched(f, dims), seeds, keep)
    return call(derived, [*front[:at], token, *front[at:]], rows, orders)


def _for_own_batching(
    method: str, f: Callee, operands: Sequence[Any], dims: Sequence[int | None], size: int
) -> list[Any]:
    """Return the operands for one call of a function that batches by itself."""
    front = _front(operands, dims)
    if method == "broadcast_all" or f.parent is not None:
        # A derivative needs its operands and their tangents in one shape.
        return _everywhere(front, dims, size)
    if method == "expand_dims":
        return [x[None] if d is None else x for x, d in zip(front, dims, strict=True)]
    return front


def _batched(callee: Callee, dims: Sequence[int | None]) -> Callee:
    return callee.rows(tuple(dims)) if _own_keys(callee, dims) else callee.vmap(tuple(dims))


def _own_keys(callee: Callee, dims: Sequence[int | None]) -> bool:
    """Return whether every row has a key of its own.

    The question is the same for derivatives, whose primals come first.
    """
    return callee.options.rng is not None and dims[callee.options.rng] is not None


def _with_own_rows(
    callee: Callee, operands: Sequence[Any], dims: Sequence[int | None], size: int
) -> tuple[list[Any], list[int | None]]:
    """Give rows of their own to the operands that the function changes in place."""
    operands, dims = list(operands), list(dims)
    for i in callee.options.mutated:
        if dims[i] is None:
            operands[i] = jnp.broadcast_to(operands[i], (size, *operands[i].shape))
            dims[i] = 0
    return operands, dims


def _front(operands: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    """Return the operands with their rows first."""
    return [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True)]


def _rows_first(dims: Sequence[int | None]) -> tuple[int | None, ...]:
    """Return the dims of operands whose rows come first."""
    return tuple(None if d is None else 0 for d in dims)


def _everywhere(front: Sequence[Any], dims: Sequence[int | None], size: int) -> list[Any]:
    """Return operands whose rows come first, all of them with rows."""
    return [
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else x
        for x, d in zip(front, dims, strict=True)
    ]


def _choose(callee: Callee, operands: Sequence[Any], dims: Sequence[int | None]) -> str:
    """Return a method of ``vmap_method``, or "rows" where every row has a key of its own."""
    if _own_keys(callee, dims):
        return "sequential" if callee.options.compiled else "rows"
    method = callee.options.vmap_method
    if method not in ("auto", "torch"):
        return method
    avals = tuple((x.shape, x.dtype) for x in map(jax.typeof, operands))
    for shape, _ in avals:
        refuse_symbolic(shape, f"an operand in a batch of {callee.options.label}")
    batched = callee.vmap(tuple(dims))
    # The root remembers them: between eager calls nobody holds a derived callee.
    refusals = callee.root.refusals
    key = (batched.path, avals)
    if key not in refusals:
        with jax.ensure_compile_time_eval():
            refusals[key] = runs_on_fakes(
                in_parts(batched.program, batched.program.functional),
                [Spec(shape, dtype_j2t(d), callee.options.device) for shape, d in avals],
                callee.options.default_dtype,
                callee.options.roots,
            )
    refusal = refusals[key]
    if refusal is None:
        return "torch"
    label = callee.options.label
    if method == "torch":
        raise Torch2JaxError(
            f"{label}{callee.path} cannot be batched by torch.func.vmap: {refusal}. Use "
            'vmap_method="auto" or "sequential" to call it row by row.'
        )
    if ("warned", label) not in callee.options.notes:
        callee.options.notes.add(("warned", label))
        warnings.warn(
            f"{label} is called row by row under jax.vmap, because torch.func.vmap cannot batch "
            f'it: {refusal}. vmap_method="sequential" says so without this warning.',
            Torch2JaxWarning,
            stacklevel=2,
        )
    return "sequential"


def _loop(
    callee: Callee,
    operands: Sequence[Any],
    dims: Sequence[int | None],
    results: Any,
    orders: int | None,
    unroll: bool,
) -> list[Any]:
    """Make one call for each row."""
    mapped = [jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True) if d is not None]

    def one(rows: list[Any]) -> list[Any]:
        it = iter(rows)
        args = [x if d is None else next(it) for x, d in zip(operands, dims, strict=True)]
        return call(callee, args, results, orders)

    if not unroll:
        return jax.lax.map(one, mapped)
    size = mapped[0].shape[0]
    calls = [one([x[i] for x in mapped]) for i in range(size)]
    return [jnp.stack(column) for column in zip(*calls, strict=True)]


batching.primitive_batchers[torch_call_p] = _batch
