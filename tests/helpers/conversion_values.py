"""Dtypes and values that the tests of the conversions convert."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch

FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]
NAMES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *(name for name in FLOAT8 if hasattr(torch, name)),
]


NEEDS_X64 = ["uint64", "float64", "complex128"]


def numpy_dtype(name: str) -> np.dtype:
    """The dtype from NumPy's or ml_dtypes' own table."""
    return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


def numpy_values(name: str, shape: tuple[int, ...] = (4, 6)) -> np.ndarray:
    """Values that every dtype holds exactly, some negative where there is a sign."""
    dtype = numpy_dtype(name)
    signed = dtype.kind not in "iu" and name not in ("bool", "float8_e8m0fnu")
    count = np.arange(np.prod(shape))
    return (np.exp2(count % 5) * (-1.0) ** (signed * count)).reshape(shape).astype(dtype)


def torch_values(name: str, shape: tuple[int, ...] = (4, 6)) -> torch.Tensor:
    """The same values, made by torch."""
    values = numpy_values(name, shape)
    wide = torch.from_numpy(values if values.dtype.isbuiltin == 1 else values.astype(np.float32))
    return wide.to(getattr(torch, name), copy=True)


def quietly(make: Callable[[], Any]) -> Any:
    """What make returns; torch warns that some kinds of tensors are prototypes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def shares(array: jax.Array, tensor: torch.Tensor) -> bool:
    return array.unsafe_buffer_pointer() == tensor.data_ptr()


def check_tensor(tensor: torch.Tensor, values: np.ndarray) -> None:
    assert type(tensor) is torch.Tensor
    assert not tensor.requires_grad
    assert str(tensor.dtype) == f"torch.{values.dtype.name}"
    assert tuple(tensor.shape) == values.shape
    if values.size:
        assert (
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == values.tobytes()
        )


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(int(np.prod(shape)), dtype=torch.int64).to(dtype, copy=True).reshape(shape)
