"""Batching: ``vmap`` of a call is one call of a batched callable, or a loop.

``vmap_method`` decides, with the names and meaning that ``jax.pure_callback`` gives them:

    auto                 ``torch`` where torch can batch the function, else ``sequential``
    torch                one call through ``torch.func.vmap``
    sequential           ``jax.lax.map`` over single calls; ``sequential_unrolled`` unrolls it
    expand_dims          the function batches by itself: unbatched operands get a leading dim of 1
    broadcast_all        the same, unbatched operands are broadcast to the batch
    legacy_vectorized    the same, unbatched operands are passed as they are

Rows with keys of their own (``rng=``) run one after the other inside one call, whatever the method.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.interpreters import batching

from ..._conversions.dtypes import dtype_j2t
from ..._errors import Torch2JaxError, Torch2JaxWarning
from ..._refusals import refuse_symbolic
from ..torch_side.callee import Callee
from ..torch_side.inference import Spec, runs_on_fakes
from ..torch_side.normalizations import in_parts
from ..torch_side.tape.calls import is_keep, is_vjp, keeping, with_token
from .primitive import TOKEN, call, torch_call_p


def specs_of(avals: Iterable[tuple[tuple[int, ...], Any]], device: Any) -> list[Spec]:
    """Specs of operands with these (shape, dtype) pairs."""
    return [Spec(tuple(shape), dtype_j2t(dtype), device) for shape, dtype in avals]


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
    differentiable: bool,
) -> tuple[list[Any], list[int | None]]:
    if is_keep(callee):
        return _batch_keep(operands, dims, callee, results, differentiable)
    if callee.keep is not None:
        return _batch_with_token(operands, dims, callee, results, differentiable)
    size = _size(operands, dims)
    operands, dims = _own_rows(callee, operands, dims, size)
    rows = [((size, *shape), dtype) for shape, dtype in results]
    if size == 0:
        return [jnp.zeros(*row) for row in rows], [0] * len(rows)
    method = _choose(callee, operands, dims)
    if method in ("torch", "rows"):
        out = call(_batched(callee, dims), operands, rows, differentiable)
    elif method.startswith("sequential"):
        out = _loop(
            callee, operands, dims, results, differentiable, method == "sequential_unrolled"
        )
    else:
        front = _front(operands, dims)
        if method == "broadcast_all" or callee.parent is not None:
            # A derivative needs its operands and their tangents in one shape.
            front = [
                jnp.broadcast_to(x, (size, *x.shape)) if d is None else x
                for x, d in zip(front, dims, strict=True)
            ]
        elif method == "expand_dims":
            front = [x[None] if d is None else x for x, d in zip(front, dims, strict=True)]
        out = call(callee, front, rows, differentiable)
    return out, [0] * len(out)


def _batched(callee: Callee, dims: Sequence[int | None]) -> Callee:
    return callee.rows(tuple(dims)) if _own_keys(callee, dims) else callee.vmap(tuple(dims))


def _own_keys(callee: Callee, dims: Sequence[int | None]) -> bool:
    """Whether every row has a key of its own. Of a derivative too, the primals come first."""
    return callee.options.rng is not None and dims[callee.options.rng] is not None


def _own_rows(
    callee: Callee, operands: Sequence[Any], dims: Sequence[int | None], size: int
) -> tuple[list[Any], list[int | None]]:
    """Operands and dims in which what the function changes in place has rows of its own."""
    operands, dims = list(operands), list(dims)
    for i in callee.options.mutated:
        if dims[i] is None:
            operands[i] = jnp.broadcast_to(operands[i], (size, *operands[i].shape))
            dims[i] = 0
    return operands, dims


def _size(operands: Sequence[Any], dims: Sequence[int | None]) -> int:
    return next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)


def _front(operands: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    """Operands with their rows first."""
    return [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True)]


def _batch_keep(
    operands: Sequence[Any],
    dims: Sequence[int | None],
    callee: Callee,
    results: Any,
    differentiable: bool,
) -> tuple[list[Any], list[int | None]]:
    """A call that keeps its graph: the batched function keeps one graph for all rows.

    Only where every operand that is differentiated has rows of its own: the gradient of one that is
    shared would come out summed. Otherwise nothing is kept, and the token says so.
    """
    f = callee.parent
    assert f is not None
    size = _size(operands, dims)
    if size == 0:
        zeros = [jnp.zeros((0, *shape), dtype) for shape, dtype in results[:-1]]
        return [*zeros, jnp.zeros(*TOKEN)], [0] * len(zeros) + [None]
    operands, dims = _own_rows(f, operands, dims, size)
    method = _choose(f, operands, dims)
    if method.startswith("sequential"):
        unroll = method == "sequential_unrolled"
        out = _loop(callee, operands, dims, results, differentiable, unroll)
        return out, [0] * len(out)
    if method in ("torch", "rows") and all(dims[i] is not None for i in callee.program.wrt):
        rows = [((size, *shape), dtype) for shape, dtype in results[:-1]]
        batched = _batched(f, _zeros(dims))
        out = call(keeping(batched, callee.program.wrt), _front(operands, dims), (*rows, TOKEN))
        return out, [0] * len(rows) + [None]
    out, out_dims = _batch(
        operands, dims, callee=f, results=results[:-1], differentiable=differentiable
    )
    return [*out, jnp.zeros(*TOKEN)], [*out_dims, None]


def _batch_with_token(
    operands: Sequence[Any],
    dims: Sequence[int | None],
    callee: Callee,
    results: Any,
    differentiable: bool,
) -> tuple[list[Any], list[int | None]]:
    """A derivative that takes a token: what it does with one graph for all rows."""
    f, keep = callee.parent, callee.keep
    assert f is not None
    assert keep is not None
    at = callee.inputs.index("the token")
    after = len(operands) - at - 1
    token, inner = operands[at], [*operands[:at], *operands[at + 1 :]]
    inner_dims = [*dims[:at], *dims[at + 1 :]]
    size = _size(operands, dims)
    rows = [((size, *shape), dtype) for shape, dtype in results]
    if size == 0:
        return [jnp.zeros(*row) for row in rows], [0] * len(rows)
    inner, inner_dims = _own_rows(f, inner, inner_dims, size)
    method = "sequential" if dims[at] is not None else _choose(f, inner, inner_dims)
    if method.startswith("sequential"):
        unroll = method == "sequential_unrolled"
        out = _loop(callee, operands, dims, results, differentiable, unroll)
        return out, [0] * len(out)
    if method not in ("torch", "rows"):  # the function batches by itself, and keeps nothing
        return _batch(inner, inner_dims, callee=f, results=results, differentiable=differentiable)
    front, front_dims = _front(inner, inner_dims), _zeros(inner_dims)
    primal_dims, seed_dims = front_dims[:at], front_dims[at:]
    if is_vjp(f):
        # Every cotangent gets rows, so that one backward pass serves them all.
        front[at:] = [
            jnp.broadcast_to(x, (size, *x.shape)) if d is None else x
            for x, d in zip(front[at:], seed_dims, strict=True)
        ]
        seed_dims = (0,) * after
    if is_vjp(f) and all(primal_dims[i] is not None for i in keep.program.wrt):
        assert f.parent is not None
        batched = _batched(f.parent, primal_dims)
        pullback = batched.vjp(f.program.wrt, f.program.of)
        derived = with_token(pullback, after, keeping(batched, keep.program.wrt))
    else:
        derived = with_token(_batched(f, (*primal_dims, *seed_dims)), after, keep)
    out = call(derived, [*front[:at], token, *front[at:]], rows, differentiable)
    return out, [0] * len(out)


def _zeros(dims: Sequence[int | None]) -> tuple[int | None, ...]:
    return tuple(None if d is None else 0 for d in dims)


def _choose(callee: Callee, operands: Sequence[Any], dims: Sequence[int | None]) -> str:
    if _own_keys(callee, dims):
        return "rows"
    method = callee.options.vmap_method
    if method not in ("auto", "torch"):
        return method
    avals = tuple((x.shape, x.dtype) for x in map(jax.typeof, operands))
    for shape, _ in avals:
        refuse_symbolic(shape, f"an operand in a batch of {callee.options.label}")
    batched = callee.vmap(tuple(dims))
    # On the root: between eager calls nobody holds a derived callee.
    memo = callee.root.memo
    key = ("refusal", batched.path, avals)
    if key not in memo:
        with jax.ensure_compile_time_eval():
            memo[key] = runs_on_fakes(
                in_parts(batched.program, batched.program.functional),
                specs_of(avals, callee.options.device),
                callee.options.default_dtype,
                callee.options.roots,
            )
    refusal = memo[key]
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
    differentiable: bool,
    unroll: bool,
) -> list[Any]:
    mapped = [jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True) if d is not None]

    def one(rows: list[Any]) -> list[Any]:
        it = iter(rows)
        args = [x if d is None else next(it) for x, d in zip(operands, dims, strict=True)]
        return call(callee, args, results, differentiable)

    if not unroll:
        return jax.lax.map(one, mapped)
    size = mapped[0].shape[0]
    calls = [one([x[i] for x in mapped]) for i in range(size)]
    return [jnp.stack(column) for column in zip(*calls, strict=True)]


batching.primitive_batchers[torch_call_p] = _batch
