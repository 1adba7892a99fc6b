"""Dtypes have the same names in PyTorch and JAX; DLPack does not know all of them."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .._compat.jax import x64_enabled as x64_enabled
from .._errors import SignatureError, UnsupportedDtypeError
from .narrowed import NARROWED

DType: TypeAlias = "np.dtype[Any]"

_NAMES = (  # they are the same on both sides
    *("bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    "float8_e8m0fnu",  # torch has it since 2.7
)
TO_JAX: dict[torch.dtype, DType] = {
    getattr(torch, name.rstrip("_")): np.dtype(getattr(jnp, name))
    for name in _NAMES
    if hasattr(torch, name.rstrip("_"))
}
_TO_TORCH: dict[DType, torch.dtype] = {dtype: key for key, dtype in TO_JAX.items()}


def dtype_t2j(torch_dtype: torch.dtype) -> DType:
    """Return the JAX dtype of the same name as a PyTorch dtype.

    64-bit dtypes stay 64-bit, whatever `jax_enable_x64` says.

    Args:
        torch_dtype: a `torch.dtype`.

    Returns:
        The `numpy.dtype` that JAX uses for it.

    Raises:
        UnsupportedDtypeError: JAX has no such dtype (quantized, `torch.complex32`, sub-byte).
        SignatureError: not a `torch.dtype`.

    Examples:
        >>> dtype_t2j(torch.bfloat16) == jnp.bfloat16
        True
        >>> dtype_t2j(torch.float64)
        dtype('float64')
    """
    try:
        return TO_JAX[torch_dtype]
    except (KeyError, TypeError):  # the latter says that it cannot be hashed
        pass
    if not isinstance(torch_dtype, torch.dtype):
        raise SignatureError(
            f"dtype_t2j takes a torch.dtype, got {torch_dtype!r} of type "
            f"{type_name(torch_dtype)}. dtype_j2t goes the other way."
        )
    raise UnsupportedDtypeError(
        f"JAX has no counterpart of {torch_dtype}. {supported('torch.')} Convert the tensor "
        f"first: tensor.dequantize() if it is quantized, tensor.to(dtype) otherwise."
    )


def dtype_j2t(jax_dtype: Any) -> torch.dtype:
    """Return the PyTorch dtype of the same name as a JAX dtype.

    Args:
        jax_dtype: whatever `numpy.dtype` accepts: a dtype, a scalar type (`jnp.float32`,
            `np.float32`), a name (`"bfloat16"`, `"f4"`). `float` and `int` are 64-bit, as in NumPy.

    Returns:
        The `torch.dtype`.

    Raises:
        UnsupportedDtypeError: PyTorch has no such dtype (`int4`, random keys, `float0`, strings).
        SignatureError: not a dtype at all.

    Examples:
        >>> dtype_j2t(jnp.float32), dtype_j2t("bfloat16"), dtype_j2t(np.dtype("int8"))
        (torch.float32, torch.bfloat16, torch.int8)
    """
    try:
        return _TO_TORCH[jax_dtype]  # most often it is a numpy.dtype
    except (KeyError, TypeError):
        pass
    if _is_key_dtype(jax_dtype):
        raise UnsupportedDtypeError(
            f"PyTorch has no counterpart of {jax_dtype}, the dtype of JAX's random keys. "
            f"{supported()} Convert the bits of the key: jax.random.key_data(key)."
        )
    dtype = _as_numpy_dtype(jax_dtype)
    if dtype is None:
        remedy = " dtype_t2j goes the other way." if isinstance(jax_dtype, torch.dtype) else ""
        raise SignatureError(
            f"dtype_j2t takes a JAX or NumPy dtype, a scalar type or the name of a dtype, "
            f"got {jax_dtype!r} of type {type_name(jax_dtype)}.{remedy}"
        )
    if dtype in _TO_TORCH:
        return _TO_TORCH[dtype]
    if dtype == jax.dtypes.float0:
        raise UnsupportedDtypeError(
            f"PyTorch has no counterpart of float0, the dtype of JAX's gradients of integers and "
            f"bools. {supported()} Leave such a gradient out: it is zero."
        )
    raise UnsupportedDtypeError(
        f"PyTorch has no counterpart of {dtype}. {supported()} "
        f"Convert the array first: array.astype(dtype)."
    )


def canonical(torch_dtype: torch.dtype) -> DType:
    """Return the dtype in which JAX carries values of a PyTorch dtype, a narrow one with x64 off.

    Raises:
        UnsupportedDtypeError: as in `dtype_t2j`.

    Examples:
        >>> canonical(torch.float64)  # with x64 off, as JAX starts
        dtype('float32')
    """
    return dtype_t2j(torch_dtype if x64_enabled() else NARROWED.get(torch_dtype, torch_dtype))


def needs_x64(torch_dtype: torch.dtype) -> bool:
    """Return whether tensors of the dtype are refused because x64 is off.

    Of the 64-bit dtypes int64 alone is not refused: PyTorch uses it everywhere, and its values
    mostly fit.
    """
    return torch_dtype in NARROWED and torch_dtype is not torch.int64 and not x64_enabled()


def _as_numpy_dtype(x: Any) -> DType | None:
    if x is None:  # NumPy reads None as float64
        return None
    try:
        return np.dtype(x).newbyteorder("=")
    except TypeError:
        return None


def _is_key_dtype(x: Any) -> bool:
    try:
        return bool(jnp.issubdtype(x, jax.dtypes.extended))
    except TypeError:
        return False


def supported(prefix: str = "") -> str:
    """Return a sentence that lists the dtypes which both sides have."""
    return f"Supported: {', '.join(prefix + dtype.name for dtype in _TO_TORCH)}."


def carrier_of(dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype whose bits travel for those of ``dtype``; None where DLPack carries it."""
    return None if dtype.itemsize > 1 or not dtype.is_floating_point else _float8_carrier(dtype)


@functools.cache
def _float8_carrier(dtype: torch.dtype) -> torch.dtype | None:
    # torch and jax learnt each of these with another release, so both are asked.
    probe = torch.zeros(1, dtype=torch.uint8).view(dtype)
    try:
        array = jax.dlpack.from_dlpack(probe)
        carried = array.dtype == TO_JAX[dtype] and torch.from_dlpack(array).dtype is dtype
    except Exception:  # each library and each version refuses with a type of its own
        carried = False
    return None if carried else torch.uint8


def type_name(x: object) -> str:
    """Return the type of ``x`` as messages name it."""
    kind = type(x)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
