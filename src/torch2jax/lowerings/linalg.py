"""These are matrix products, decompositions, Fourier transforms and distances."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .promotion import cast, complex_of, is_inexact, result_dtype, wide
from .reductions import norm
from .registry import lowering


def _product(a: Any, b: Any) -> Any:
    """Return ``a @ b``. Half precision is added up in float32, and integers wrap, as in PyTorch."""
    if a.dtype != b.dtype:
        raise RuntimeError(
            f"expected both matrices to have the same dtype, but got {a.dtype} and {b.dtype}"
        )
    if wide(a.dtype) != a.dtype:
        return jnp.matmul(a, b, preferred_element_type=np.float32).astype(a.dtype)
    return jnp.matmul(a, b)


@lowering("mm", "bmm", "matmul", "mv", "dot")
def mm(self: Any, mat2: Any) -> Any:
    return _product(self, mat2)


@lowering("vdot")
def vdot(self: Any, other: Any) -> Any:
    return jnp.vdot(self, other)


def _scaled(x: Any, factor: Any) -> Any:
    if isinstance(factor, int | float) and factor == 1:
        return x
    return x * cast(factor, x.dtype)


def _added(self: Any, product: Any, beta: Any, alpha: Any) -> Any:
    product = _scaled(product, alpha)
    if isinstance(beta, int | float) and beta == 0:  # self does not count, not even NaN in it
        return jnp.broadcast_to(product, jnp.broadcast_shapes(self.shape, product.shape))
    return _scaled(cast(self, product.dtype), beta) + product


@lowering("addmm", "baddbmm", "addmv")
def addmm(self: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    half = wide(mat1.dtype) != mat1.dtype
    if half:
        product = jnp.matmul(mat1, mat2, preferred_element_type=np.float32)
        return _added(self, product, beta, alpha).astype(mat1.dtype)
    return _added(self, _product(mat1, mat2), beta, alpha)


@lowering("addbmm")
def addbmm(self: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return _added(self, jnp.einsum("bij,bjk->ik", batch1, batch2), beta, alpha)


@lowering("addr")
def addr(self: Any, vec1: Any, vec2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    dtype = result_dtype(self, vec1, vec2)
    outer = cast(vec1, dtype)[:, None] * cast(vec2, dtype)[None]
    if dtype == np.bool_:
        outer = outer & bool(alpha)
        return (self & bool(beta)) | outer
    return cast(_added(cast(self, dtype), outer, beta, alpha), dtype)


@lowering("linear")
def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    return _product(input, weight.T) if bias is None else addmm(bias, input, weight.T)


@lowering("linear_backward")
def linear_backward(self: Any, grad_output: Any, weight: Any, output_mask: Any) -> Any:
    """Return the gradients of x, W and b in y = x W^T + b, None where not asked for.

    An operand that none of the wanted gradients needs may be None.
    """
    needs_input, needs_weight, needs_bias = output_mask
    d_input = d_weight = d_bias = None
    if needs_input:
        d_input = _product(grad_output, jnp.conj(weight))
    if needs_weight:
        d_weight = _product(_rows(grad_output).T, jnp.conj(_rows(self)))
    if needs_bias:
        rows = _rows(grad_output)
        d_bias = cast(jnp.sum(cast(rows, wide(rows.dtype)), 0), rows.dtype)
    return d_input, d_weight, d_bias


def _rows(x: Any) -> Any:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@lowering("matmul_backward")
def matmul_backward(grad: Any, self: Any, other: Any, mask: Any) -> Any:
    """Return both gradients, summed where an operand was broadcast, None if not asked for."""
    _, pull = jax.vjp(_product, self, other)
    # PyTorch's gradients of complex values are the conjugates of JAX's.
    found = [jnp.conj(g) for g in pull(jnp.conj(grad))]
    return tuple(g if needed else None for g, needed in zip(found, mask, strict=True))


@lowering("linalg_cross")
def cross(self: Any, other: Any, *, dim: int = -1) -> Any:
    a, b = jnp.broadcast_arrays(self, other)
    return jnp.cross(a, b, axis=dim)


@lowering("trace")
def trace(self: Any) -> Any:
    dtype = None if is_inexact(self) else np.int64 if jax.config.jax_enable_x64 else np.int32  # type: ignore[attr-defined]
    return jnp.trace(self, dtype=dtype)


# --- decompositions ------------------------------------------------------------------------------


def _asked_for(failed: Any, find: Callable[[Any], Any], a: Any) -> Any:
    """Return ``find(a)`` where ``failed`` holds and 0 elsewhere; nothing is computed if nowhere."""
    a, none = lax.stop_gradient(a), jnp.zeros(failed.shape, np.int32)
    return lax.cond(failed.any(), lambda: jnp.where(failed, find(a), none), lambda: none)


def _first_minor(a: Any) -> Any:
    """Return the order of the first leading minor that is not positive, counted from one."""
    n = a.shape[-1]

    def step(k: Any, state: Any) -> Any:
        a, info = state
        column = lax.dynamic_index_in_dim(a, k, a.ndim - 1, False)
        pivot = lax.dynamic_index_in_dim(column, k, column.ndim - 1, False).real
        wrong = ~(pivot > 0)
        info = jnp.where((info == 0) & wrong, k + 1, info).astype(np.int32)
        scaled = column / jnp.where(wrong, 1, pivot)[..., None].astype(a.dtype)
        return a - scaled[..., :, None] * jnp.conj(column)[..., None, :], info

    _, info = lax.fori_loop(0, n, step, (a, jnp.zeros(a.shape[:-2], np.int32)))
    return jnp.where(info == 0, n, info)


def _first_zero(a: Any) -> Any:
    """Return which pivot of the elimination is zero, counted from one, or 0."""
    zero = jnp.diagonal(lax.linalg.lu(a)[0], axis1=-2, axis2=-1) == 0
    return jnp.where(zero.any(-1), jnp.argmax(zero, -1) + 1, 0).astype(np.int32)


@lowering("linalg_cholesky_ex")
def cholesky_ex(self: Any, *, upper: bool = False, check_errors: bool = False) -> Any:
    lower = jnp.linalg.cholesky(self)
    failed = jnp.isnan(lower).any((-2, -1))
    info = _asked_for(failed, _first_minor, self)
    return jnp.conj(jnp.swapaxes(lower, -1, -2)) if upper else lower, info


@lowering("cholesky")
def cholesky(self: Any, upper: bool = False) -> Any:
    return cholesky_ex(self, upper=upper)[0]


@lowering("linalg_qr")
def qr(A: Any, mode: str = "reduced") -> Any:
    if mode == "r":
        return jnp.zeros((0,), A.dtype), jnp.linalg.qr(A, mode="r")
    return tuple(jnp.linalg.qr(A, mode=mode))


@lowering("linalg_eigh", "_linalg_eigh")
def eigh(A: Any, UPLO: str = "L", compute_v: bool = True) -> Any:
    # It reads one triangle, which determines the whole matrix.
    lower = A if UPLO.upper() == "L" else jnp.conj(jnp.swapaxes(A, -1, -2))
    tril = jnp.tril(lower, -1)
    diagonal = jnp.diagonal(lower, axis1=-2, axis2=-1).real.astype(A.dtype)
    eye = jnp.eye(A.shape[-1], dtype=A.dtype)
    full = tril + jnp.conj(jnp.swapaxes(tril, -1, -2)) + diagonal[..., None] * eye
    # The derivative is that of the symmetric part, as in PyTorch.
    symmetric = (A + jnp.conj(jnp.swapaxes(A, -1, -2))) / 2
    full = symmetric + lax.stop_gradient(full - symmetric)
    values, vectors = jnp.linalg.eigh(full, symmetrize_input=False)
    return values, vectors


@lowering("linalg_inv_ex")
def inv_ex(A: Any, *, check_errors: bool = False) -> Any:
    inverse = jnp.linalg.inv(A)
    singular = ~jnp.isfinite(inverse).all((-2, -1)) & jnp.isfinite(A).all((-2, -1))
    return inverse, _asked_for(singular, _first_zero, A)


@lowering("linalg_solve_triangular")
def solve_triangular(
    self: Any, B: Any, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Any:
    batch = jnp.broadcast_shapes(self.shape[:-2], B.shape[:-2])
    a = jnp.broadcast_to(self, (*batch, *self.shape[-2:]))
    b = jnp.broadcast_to(B, (*batch, *B.shape[-2:]))
    return lax.linalg.triangular_solve(
        a, b, left_side=left, lower=not upper, unit_diagonal=unitriangular
    )


@lowering("cholesky_solve")
def cholesky_solve(self: Any, input2: Any, upper: bool = False) -> Any:
    factor = jnp.conj(jnp.swapaxes(input2, -1, -2)) if upper else input2
    half = solve_triangular(factor, self, upper=False)
    return solve_triangular(jnp.conj(jnp.swapaxes(factor, -1, -2)), half, upper=True)


@lowering("linalg_matrix_exp")
def matrix_exp(self: Any) -> Any:
    """Return exp(A) as (exp(A / 4) ^ 2) ^ 2.

    JAX's rational function of A of norm 4 loses the digits of small results in float32."""
    if not self.size:
        return self
    root = jax.scipy.linalg.expm(self / 4)
    root = _product(root, root)
    return _product(root, root)


# --- transforms ----------------------------------------------------------------------------------


def _scale(x: Any, dims: Any, normalization: int, sizes: Any) -> Any:
    """Divide by nothing (0), by the root of the number of elements (1), or by that number (2)."""
    n = int(np.prod([sizes[d] for d in dims]))
    return x if normalization == 0 else x / (np.sqrt(n) if normalization == 1 else n)


def _fft(x: Any, dims: Any, forward: bool) -> Any:
    for d in dims:
        x = jnp.fft.fft(x, axis=d) if forward else jnp.fft.ifft(x, axis=d, norm="forward")
    return x


@lowering("_fft_c2c")
def fft_c2c(self: Any, dim: Any, normalization: int, forward: bool) -> Any:
    return _scale(_fft(self, dim, forward), dim, normalization, self.shape).astype(self.dtype)


@lowering("_fft_r2c")
def fft_r2c(self: Any, dim: Any, normalization: int, onesided: bool) -> Any:
    out = jnp.fft.rfft(self, axis=dim[-1]) if onesided else jnp.fft.fft(self, axis=dim[-1])
    out = _fft(out, list(dim)[:-1], True)
    return _scale(out, dim, normalization, self.shape).astype(complex_of(self.dtype))


@lowering("_fft_c2r")
def fft_c2r(self: Any, dim: Any, normalization: int, last_dim_size: int) -> Any:
    out = _fft(self, list(dim)[:-1], False)
    out = jnp.fft.irfft(out, last_dim_size, axis=dim[-1], norm="forward")
    return _scale(out, dim, normalization, out.shape).astype(out.dtype)


# --- distances -----------------------------------------------------------------------------------


@lowering("_cdist_forward")
def cdist_forward(x1: Any, x2: Any, p: float, compute_mode: int | None = None) -> Any:
    return norm(x1[..., :, None, :] - x2[..., None, :, :], p, (-1,))


@lowering("_euclidean_dist")
def euclidean_dist(x1: Any, x2: Any) -> Any:
    return cdist_forward(x1, x2, 2.0)


@lowering("_pdist_forward")
def pdist_forward(self: Any, p: float = 2) -> Any:
    rows, columns = np.triu_indices(self.shape[0], 1)
    return norm(self[rows] - self[columns], p, (-1,))
