"""These operators make tensors from nothing but sizes and numbers."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .._compat.jax import trace_state_clean
from .promotion import array_dtype, cast, category, fitting, of_dtype, result_dtype, wide
from .registry import lowering

FEW = 1 << 16
"""A tensor without operands may be a constant of a program up to this number of elements."""


def _filled(size: Any, value: Any, dtype: Any) -> Any:
    """Return a new tensor. A small one outside a trace is NumPy's, which needs no compilation."""
    size, value = tuple(size), fitting(value, dtype)
    if math.prod(size) <= FEW and trace_state_clean():
        return jnp.asarray(np.full(size, value, dtype))
    return jnp.full(size, value, dtype)


@lowering("empty.memory_format", "zeros", "prims.empty")
def zeros(size: Any, *, dtype: Any = None, **_: Any) -> Any:
    # XLA has no uninitialised memory, so it is zeros.
    return _filled(size, 0, of_dtype(dtype))


@lowering("_efficientzerotensor")
def efficientzerotensor(size: Any, *, dtype: Any = None, **_: Any) -> Any:
    return _filled(size, 0, of_dtype(dtype))


@lowering("empty_strided", "empty_permuted", "prims.empty_strided", "prims.empty_permuted")
def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Any:
    return _filled(size, 0, of_dtype(dtype))


@lowering("ones")
def ones(size: Any, *, dtype: Any = None, **_: Any) -> Any:
    return _filled(size, 1, of_dtype(dtype))


def _natural(value: Any) -> torch.dtype:
    if isinstance(value, bool):
        return torch.bool
    if isinstance(value, int):
        return torch.int64
    default = torch.get_default_dtype()
    if isinstance(value, complex):
        return torch.complex128 if default is torch.float64 else torch.complex64
    return default


@lowering("full", "prims.full", scalars=("fill_value",))
def full(size: Any, fill_value: Any, *, dtype: Any = None, **_: Any) -> Any:
    if hasattr(fill_value, "dtype"):
        wanted = result_dtype(fill_value) if dtype is None else array_dtype(dtype)
        return jnp.broadcast_to(cast(fill_value, wanted), tuple(size))
    return _filled(size, fill_value, array_dtype(dtype or _natural(fill_value)))


@lowering("scalar_tensor", "prims.scalar_tensor")
def scalar_tensor(s: Any, *, dtype: Any = None, **_: Any) -> Any:
    return full((), s, dtype=dtype or torch.get_default_dtype())


@lowering("full_like", "prims.full_like", scalars=("fill_value",))
def full_like(self: Any, fill_value: Any, *, dtype: Any = None, **_: Any) -> Any:
    wanted = self.dtype if dtype is None else array_dtype(dtype)
    return jnp.full(self.shape, fitting(fill_value, wanted), wanted)


@lowering("zeros_like", "empty_like", "prims.empty_like")
def zeros_like(self: Any, *, dtype: Any = None, **_: Any) -> Any:
    return jnp.zeros(self.shape, self.dtype if dtype is None else array_dtype(dtype))


@lowering("ones_like")
def ones_like(self: Any, *, dtype: Any = None, **_: Any) -> Any:
    return jnp.ones(self.shape, self.dtype if dtype is None else array_dtype(dtype))


@lowering("new_zeros", "new_empty")
def new_zeros(self: Any, size: Any, *, dtype: Any = None, **_: Any) -> Any:
    return jnp.zeros(tuple(size), self.dtype if dtype is None else array_dtype(dtype))


@lowering("new_empty_strided")
def new_empty_strided(self: Any, size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Any:
    return new_zeros(self, size, dtype=dtype)


@lowering("new_ones")
def new_ones(self: Any, size: Any, *, dtype: Any = None, **_: Any) -> Any:
    return jnp.ones(tuple(size), self.dtype if dtype is None else array_dtype(dtype))


@lowering("new_full", scalars=("fill_value",))
def new_full(self: Any, size: Any, fill_value: Any, *, dtype: Any = None, **_: Any) -> Any:
    wanted = self.dtype if dtype is None else array_dtype(dtype)
    return jnp.full(tuple(size), fitting(fill_value, wanted), wanted)


@lowering("fill.Scalar", "fill.Tensor", "prims.fill", scalars=True)
def fill(self: Any, value: Any) -> Any:
    return jnp.broadcast_to(cast(value, self.dtype), self.shape)


@lowering("zero")
def zero(self: Any) -> Any:
    return jnp.zeros(self.shape, self.dtype)


@lowering("arange", "arange.start", "arange.start_step")
def arange(*bounds: Any, dtype: Any = None, **_: Any) -> Any:
    start, end, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    if dtype is None:
        whole = all(isinstance(x, int) for x in (start, end, step))
        dtype = torch.int64 if whole else torch.get_default_dtype()
    out = array_dtype(dtype)
    if category(out) == 1:
        start, end, step = int(start), int(end), int(step)
    if _length(start, end, step) > FEW:  # it is no constant of the program
        places = jnp.arange(_length(start, end, step), dtype=out)
        return places * jnp.asarray(step, out) + jnp.asarray(start, out)
    exact = torch.int64 if category(out) == 1 else torch.float64
    values = torch.arange(start, end, step, dtype=exact, device="cpu")
    return jnp.asarray(values.numpy().astype(out))


@lowering("fft_fftfreq")
def fft_fftfreq(n: int, d: float = 1.0, *, dtype: Any = None, **_: Any) -> Any:
    """PyTorch's kernel resizes a view of its result."""
    return _known(torch.fft.fftfreq(n, d, dtype=dtype, device="cpu"), dtype)


def _known(values: torch.Tensor, dtype: torch.dtype | None) -> Any:
    """Return a constant of a few values that PyTorch has computed."""
    if values.is_complex() and dtype is None:
        dtype = values.dtype
    if values.is_floating_point():
        values = values.to(torch.float64)
    return jnp.asarray(values.numpy().astype(of_dtype(dtype)))


def _length(start: Any, end: Any, step: Any) -> int:
    return max(math.ceil((end - start) / step), 0) if step else 0


@lowering("prims.iota")
def iota(length: int, *, start: int, step: int, dtype: Any, **_: Any) -> Any:
    return jnp.asarray((np.arange(length) * step + start).astype(array_dtype(dtype)))


@lowering("linspace")
def linspace(start: Any, end: Any, steps: int, *, dtype: Any = None, **_: Any) -> Any:
    values = torch.linspace(start, end, steps, dtype=dtype, device="cpu")
    return _known(values, dtype)


def _between(start: Any, end: Any, steps: int, dtype: Any) -> Any:
    """Compute from both ends to the middle. For integers the ends are integers, steps are not."""
    compute = jnp.result_type(float) if category(dtype) < 2 else wide(dtype)
    rounded = category(dtype) < 2 or steps > 1  # as in PyTorch
    ends = [cast(x, dtype) if rounded else x for x in (start, end)]
    first, last = (cast(x, compute) for x in ends)
    # XLA would multiply by the rounded inverse of a constant.
    step = (last - first) / jax.lax.optimization_barrier(jnp.asarray(max(steps - 1, 1), compute))
    i = np.arange(steps, dtype=compute)
    up, down = first + step * i, last - step * i[::-1]
    return jnp.where(i < steps // 2, up, down) if steps > 1 else up


@lowering("linspace.Tensor_Tensor", "linspace.Tensor_Scalar", "linspace.Scalar_Tensor")
def linspace_of_values(start: Any, end: Any, steps: int, *, dtype: Any = None, **_: Any) -> Any:
    found = of_dtype(dtype)
    return cast(_between(start, end, steps, found), found)


@lowering("logspace.Tensor_Tensor", "logspace.Tensor_Scalar", "logspace.Scalar_Tensor")
def logspace_of_values(
    start: Any, end: Any, steps: int, base: float = 10.0, *, dtype: Any = None, **_: Any
) -> Any:
    found = of_dtype(dtype)
    values = jnp.power(base, _between(start, end, steps, found))
    if category(found) < 2:  # a power close to an integer is that integer
        near = jnp.round(values)
        off = 4 * jnp.finfo(values.dtype).eps * jnp.abs(values)
        values = jnp.where(jnp.abs(values - near) <= off, near, values)
    return cast(values, found)


@lowering("logspace")
def logspace(
    start: Any, end: Any, steps: int, base: float = 10.0, *, dtype: Any = None, **_: Any
) -> Any:
    values = torch.logspace(start, end, steps, base, dtype=dtype, device="cpu")
    return _known(values, dtype)


@lowering("kaiser_window", "kaiser_window.periodic", "kaiser_window.beta")
def kaiser_window(
    window_length: int, periodic: bool = True, beta: float = 12.0, *, dtype: Any = None, **_: Any
) -> Any:
    values = torch.kaiser_window(window_length, periodic, beta, dtype=torch.float64, device="cpu")
    return _known(values, dtype)


@lowering("eye", "eye.m")
def eye(n: int, m: int | None = None, *, dtype: Any = None, **_: Any) -> Any:
    return jnp.eye(n, n if m is None else m, dtype=of_dtype(dtype))
