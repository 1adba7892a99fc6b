"""Groups of rows are multiplied with matrices of their own, as in a mixture of experts.

Let E[g, m] be 1 where row m belongs to group g, and 0 elsewhere. There are two products:

    rows(x, w)[m, n]     = sum_gk E[g, m] x[m, k] w[g, k, n]
    outer(a, b)[g, k, n] = sum_m  E[g, m] a[m, k] b[m, n]

Both are linear in each operand. With y' and c' for the cotangents of their results, and w^T for w
with its last two dimensions exchanged, the cotangents of their operands are

    x' = rows(y', w^T)     w' = outer(x, y')
    a' = rows(b, c'^T)     b' = rows(a, c')

so that derivatives of any order are these two products again. ``jax.lax.ragged_dot`` computes
them. It has neither the transpose of ``outer`` nor a batch of one operand alone, and therefore a
primitive stands around it that has these rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from jax.interpreters import ad, batching, mlir

from .._compat.jax import Primitive, result_aval, varying_together
from .promotion import array_dtype, cast, wide
from .registry import lowering

_PACKAGE = __name__.partition(".")[0]

grouped_p = Primitive(f"{_PACKAGE}_grouped_product")

_ROWS = lax.RaggedDotDimensionNumbers((([1], [1]), ([], [])), [0], [0])
_OUTER = lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])


def _grouped(a: Any, b: Any, sizes: Any, outer: bool) -> Any:
    """Return ``outer(a, b)``, or else ``rows(a, b)``, of groups of these sizes and one dtype."""
    return grouped_p.bind(*varying_together([a, b, sizes]), outer=outer)


def _rows(x: Any, w: Any, sizes: Any) -> Any:
    return _grouped(x, w, sizes, False)


def _outer(a: Any, b: Any, sizes: Any) -> Any:
    return _grouped(a, b, sizes, True)


@grouped_p.def_abstract_eval
def _abstract_eval(a: Any, b: Any, sizes: Any, *, outer: bool) -> Any:
    shape = (*sizes.shape, a.shape[1], b.shape[1]) if outer else (a.shape[0], b.shape[2])
    return result_aval(shape, a.dtype, (a, b, sizes))


def _ragged(a: Any, b: Any, sizes: Any, *, outer: bool) -> Any:
    numbers, dtype = _OUTER if outer else _ROWS, wide(a.dtype)
    out = lax.ragged_dot_general(a, b, sizes, numbers, preferred_element_type=dtype)
    return out.astype(a.dtype)


def _dense(a: Any, b: Any, sizes: Any, *, outer: bool) -> Any:
    """Compute the same by matrices that have zeros for the rows of other groups."""
    ends = jnp.cumsum(sizes)[:, None]
    row = jnp.arange(a.shape[0])
    member = (ends - sizes[:, None] <= row) & (row < ends)
    grouped = jnp.where(member[..., None], a, 0)
    formula = "gmk,mn->gkn" if outer else "gmk,gkn->mn"
    out = jnp.einsum(formula, grouped, b, preferred_element_type=wide(a.dtype))
    return out.astype(a.dtype)


_jitted = jax.jit(_ragged, static_argnames="outer")


@grouped_p.def_impl
def _impl(a: Any, b: Any, sizes: Any, *, outer: bool) -> Any:
    return _jitted(a, b, sizes, outer=outer)


def _batch(operands: Sequence[Any], dims: Sequence[Any], *, outer: bool) -> tuple[Any, int]:
    return jax.vmap(lambda *xs: _dense(*xs, outer=outer), tuple(dims))(*operands), 0


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, outer: bool) -> tuple[Any, Any]:
    a, b, sizes = primals
    da, db, _ = tangents
    out = _grouped(a, b, sizes, outer)
    terms = []
    if not isinstance(da, ad.Zero):
        terms.append(_grouped(da, b, sizes, outer))
    if not isinstance(db, ad.Zero):
        terms.append(_grouped(a, db, sizes, outer))
    if not terms:
        return out, ad.Zero(jax.typeof(out).to_tangent_aval())
    return out, sum(terms[1:], terms[0])


def _transpose(ct: Any, a: Any, b: Any, sizes: Any, *, outer: bool) -> list[Any]:
    of_a = ad.is_undefined_primal(a)
    if isinstance(ct, ad.Zero):
        zero = ad.Zero((a if of_a else b).aval)
        return [zero, None, None] if of_a else [None, zero, None]
    if of_a:
        matrices = jnp.swapaxes(ct if outer else b, 1, 2)
        return [_rows(b if outer else ct, matrices, sizes), None, None]
    return [None, _rows(a, ct, sizes) if outer else _outer(a, ct, sizes), None]


ad.primitive_jvps[grouped_p] = _jvp
ad.primitive_transposes[grouped_p] = _transpose
batching.primitive_batchers[grouped_p] = _batch
mlir.register_lowering(grouped_p, mlir.lower_fun(_ragged, multiple_results=False))


# --- PyTorch's operator --------------------------------------------------------------------------


@lowering("_grouped_mm")
def grouped_mm(
    self: Any,
    mat2: Any,
    offs: Any = None,
    bias: Any = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Return one product for each group.

    ``offs`` has the ends of the groups in the dimension that they divide. Rows and columns beyond
    the last end are 0. PyTorch leaves them undefined.
    """
    flat, flat2 = self.ndim == 2, mat2.ndim == 2
    if self.ndim not in (2, 3) or mat2.ndim not in (2, 3):
        raise RuntimeError(
            f"grouped_mm takes matrices of 2 or 3 dimensions, got {self.ndim} and {mat2.ndim}"
        )
    if (offs is not None) is not (flat or flat2):
        raise RuntimeError(
            "Have to provide offsets if there is a 2d matrix, or no offset if both matrices are 3d"
        )
    if self.dtype != mat2.dtype:
        raise RuntimeError(
            f"expected both matrices to have the same dtype, but got {self.dtype} and {mat2.dtype}"
        )
    if bias is not None and bias.ndim > 1:
        raise RuntimeError(f"the bias of grouped_mm is added to each row, got {bias.ndim} dims")
    dtype = self.dtype if out_dtype is None else array_dtype(out_dtype)
    a, b = (cast(x, np.promote_types(x.dtype, dtype)) for x in (self, mat2))
    if offs is None:
        out = jnp.matmul(a, b, preferred_element_type=wide(a.dtype)).astype(a.dtype)
    else:
        sizes = jnp.diff(offs, prepend=jnp.zeros(1, offs.dtype))
        if flat and flat2:
            out = _outer(a.T, b, sizes)
        elif flat:
            out = _rows(a, b, sizes)
        else:
            out = _rows(b.T, jnp.swapaxes(a, 1, 2), sizes).T
    out = out if bias is None else out + cast(bias, out.dtype)
    return cast(out, dtype)
