"""Tensors become arrays and back at the speed of a call, without the checks of `t2j` and `j2t`.

What is plain goes straight to DLPack, in the extension; everything else (other layouts, float8,
64-bit values with x64 off, whatever is an error) goes the way of `t2j` and `j2t`, with the same
result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._bridge.handler import extension
from .._compat.jax import cpu_device, export_capsule, import_capsule, ready_on_gpu
from .._conversions.convert import array_beside, j2t
from .._conversions.dtypes import dtype_t2j
from .._conversions.lifetimes import find_stream
from .._conversions.refusals import GPU
from .._errors import Torch2JaxError
from .._refusals import check_may_call_jax

_EXPORTED = frozenset(
    map(
        dtype_t2j,
        (
            *(torch.bool, torch.int8, torch.int16, torch.int32, torch.int64),
            *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16),
            *(torch.float32, torch.float64, torch.complex64, torch.complex128),
        ),
    )
)
_is_pinned = torch.Tensor.is_pinned if torch.cuda.is_available() else None


def _ready(number: int) -> tuple[Any, int] | None:
    found = ready_on_gpu(GPU, number)
    if found is not None:
        find_stream(number)  # results that PyTorch drops go back in the order of that stream
    return found


Place = int | None
"""Where all tensors of a call are: ``ON_CPU``, on the GPU of a number, or None for what else."""

ON_CPU = -1


def to_arrays(operands: Sequence[Any], x64: bool) -> tuple[list[Any], int, Place]:
    """Return the operands as JAX takes them: tensors as arrays, other values as they are.

    Return also how many tensors there are, and where all of them are; results will be there, too.
    """
    check_may_call_jax("a jax2torch function")
    return extension.to_arrays(
        operands, x64, import_capsule, cpu_device(), _ready, _is_pinned, _array
    )


def _array(x: torch.Tensor, i: int) -> Any:
    try:
        return array_beside(x)
    except Torch2JaxError as error:
        error.operand = i  # type: ignore[attr-defined]  # a caller that knows its name adds that
        raise


def to_tensors(
    arrays: Sequence[Any], dtypes: frozenset[Any], place: Place
) -> tuple[torch.Tensor, ...]:
    """Return results of these dtypes as tensors in their memory; on a CPU wait for them."""
    if place is not None and dtypes <= _EXPORTED:
        return extension.to_tensors(arrays, export_capsule, place)
    return tuple([j2t(x) for x in arrays])
