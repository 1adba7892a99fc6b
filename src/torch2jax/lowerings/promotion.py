"""The lowerings share PyTorch's dtypes and type promotion."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .._conversions.dtypes import canonical, dtype_j2t, x64_enabled
from .._errors import UnsupportedDtypeError

# --- dtypes --------------------------------------------------------------------------------------


def array_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the array's dtype for a tensor's dtype, which has 32 bits for 64 while x64 is off.

    Raises:
        UnsupportedDtypeError: for uint64 while x64 is off, and for dtypes that JAX lacks.
    """
    if dtype is torch.uint64 and not x64_enabled():
        raise UnsupportedDtypeError(
            f"a tensor of {dtype} on device jax needs 64-bit values, which JAX has switched off. "
            'Switch them on, jax.config.update("jax_enable_x64", True), or use torch.int64.'
        )
    return canonical(dtype)


def of_dtype(dtype: torch.dtype | None) -> np.dtype[Any]:
    """Return the dtype that a factory is asked for; None stands for PyTorch's default."""
    return array_dtype(dtype or torch.get_default_dtype())


def per_dimension(values: Any, n: int) -> tuple[int, ...]:
    """Return a size or step for each of ``n`` dimensions; one value may stand for all."""
    values = (values,) if isinstance(values, int) else tuple(values)
    return values * n if len(values) == 1 else values


def category(dtype: Any) -> int:
    """Return PyTorch's category for promotion: 0 bool, 1 integer, 2 floating, 3 complex."""
    if dtype == np.bool_:
        return 0
    if jnp.issubdtype(dtype, jnp.integer):
        return 1
    return 3 if jnp.issubdtype(dtype, jnp.complexfloating) else 2


def is_float(x: Any) -> bool:
    return category(x.dtype) == 2


def is_inexact(x: Any) -> bool:
    return category(x.dtype) >= 2


def default_float() -> np.dtype[Any]:
    return array_dtype(torch.get_default_dtype())


def default_int() -> np.dtype[Any]:
    return array_dtype(torch.int64)


_COMPLEX = {np.dtype(np.float64): np.dtype(np.complex128)}
_HALF = (np.dtype(jnp.bfloat16), np.dtype(np.float16))


def complex_of(dtype: Any) -> np.dtype[Any]:
    return _COMPLEX.get(np.dtype(dtype), np.dtype(np.complex64))


def real_of(dtype: Any) -> np.dtype[Any]:
    dtype = np.dtype(dtype)
    if dtype.kind != "c":
        return dtype
    return np.dtype(np.float32 if dtype.itemsize == 8 else np.float64)


@functools.lru_cache(None)
def _promoted(a: np.dtype[Any], b: np.dtype[Any]) -> np.dtype[Any]:
    return canonical(torch.promote_types(dtype_j2t(a), dtype_j2t(b)))


def is_number(x: Any) -> bool:
    """Say whether it is a Python number, or the weakly typed array that stands for one."""
    return isinstance(x, bool | int | float | complex) or getattr(x, "weak_type", False)


def _number_dtype(x: Any) -> np.dtype[Any]:
    rank = category(x.dtype) if hasattr(x, "dtype") else (bool, int, float, complex).index(type(x))
    if rank == 0:
        return np.dtype(bool)
    if rank == 1:
        return default_int()
    return default_float() if rank == 2 else complex_of(default_float())


def result_dtype(*xs: Any) -> np.dtype[Any]:
    """Return PyTorch's common dtype: tensors go before 0-d tensors, and those before numbers."""
    ranks: list[np.dtype[Any] | None] = [None, None, None]
    for x in xs:
        number = is_number(x)
        level = 2 if number else (0 if x.ndim else 1)
        dtype = _number_dtype(x) if number else np.dtype(x.dtype)
        have = ranks[level]
        ranks[level] = dtype if have is None else _promoted(have, dtype)
    lower = _combine(ranks[1], ranks[2])
    found = _combine(ranks[0], lower)
    assert found is not None
    return found


def _combine(high: np.dtype[Any] | None, low: np.dtype[Any] | None) -> np.dtype[Any] | None:
    if high is None or low is None:
        return low if high is None else high
    if category(low) <= category(high):
        return high
    if category(high) == 2:  # complex beside floats has the floats' precision
        return complex_of(high)
    return low if category(high) == 0 or category(low) >= 2 else _promoted(high, low)


def cast(x: Any, dtype: Any) -> Any:
    """Return ``x`` in ``dtype``. Complex to real drops the imaginary part, as in PyTorch."""
    if not hasattr(x, "dtype"):
        return jnp.asarray(x, dtype)
    if x.dtype == dtype:
        return jax.lax.convert_element_type(x, dtype) if getattr(x, "weak_type", False) else x
    if category(x.dtype) == 3 and category(dtype) in (1, 2):
        x = x.real
    return jax.lax.convert_element_type(x, dtype)


def fitting(x: Any, dtype: Any) -> Any:
    """Return a number that fills an array of ``dtype``.

    Raises:
        OverflowError: for integers beyond int32 in arrays of int32. JAX would drop upper bits.
    """
    if type(x) is int and dtype == np.int32 and not -(2**31) <= x < 2**31:
        raise OverflowError(
            f"{x} does not fit int32, in which JAX carries int64 while 64-bit values are off. "
            'Switch them on: jax.config.update("jax_enable_x64", True).'
        )
    return x


def promote(*xs: Any) -> list[Any]:
    """Return the arrays in one dtype, that of ``result_dtype``."""
    dtype = result_dtype(*xs)
    return [cast(x, dtype) for x in xs]


def wide(dtype: Any) -> np.dtype[Any]:
    """Return the dtype in which PyTorch computes: float32 for half precision."""
    return np.dtype(np.float32) if np.dtype(dtype) in _HALF else np.dtype(dtype)


def floating(dtype: Any) -> np.dtype[Any]:
    """Return the dtype of a result that is floating for integers."""
    return np.dtype(dtype) if category(dtype) >= 2 else default_float()


def dims_of(x: Any, dims: Any) -> tuple[int, ...]:
    """Return the axes of ``dim=``, where None and empty mean all."""
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return tuple(range(x.ndim))
    if isinstance(dims, int):
        dims = (dims,)
    n = max(x.ndim, 1)
    for d in dims:
        if not -n <= d < n:
            raise IndexError(
                f"Dimension out of range (expected to be in range of [{-n}, {n - 1}], but got {d})"
            )
    return tuple(d % x.ndim for d in dims) if x.ndim else ()
