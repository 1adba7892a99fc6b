"""Tensors to arrays and back at the speed of a call: `t2j` and `j2t` without their checks.

What is plain goes straight to DLPack; everything else (GPUs, other layouts, float8, 64-bit values
with x64 off, whatever is an error) goes through `t2j` and `j2t`, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._compat import export_capsule, import_capsule
from ._convert import j2t, t2j
from ._dtypes import dtype_t2j, x64_enabled
from ._errors import Torch2JaxError
from ._state import check_may_call_jax
from ._torch_compat import from_capsule, to_capsule

_32 = (
    *(torch.bool, torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32),
    *(torch.float16, torch.bfloat16, torch.float32, torch.complex64),
)
_64 = (torch.int64, torch.uint64, torch.float64, torch.complex128)
_PLAIN = {False: frozenset(_32), True: frozenset(_32 + _64)}
_EXPORTED = frozenset(map(dtype_t2j, _32 + _64))
_TYPES = (torch.Tensor, torch.nn.Parameter)
_ALIGNMENT = 64


def to_arrays(operands: Sequence[Any], reads: frozenset[int] | None, at_least: int) -> list[Any]:
    """Operands as JAX takes them: tensors as arrays, other values as they are.

    Of the first ``at_least`` operands only those in ``reads`` are needed; the others become None.
    """
    check_may_call_jax("a jax2torch function")
    plain = _PLAIN[x64_enabled()]
    arrays: list[Any] = []
    for i, x in enumerate(operands):
        if reads is not None and i < at_least and i not in reads:
            arrays.append(None)
        elif type(x) not in _TYPES:
            arrays.append(_array(x, i) if isinstance(x, torch.Tensor) else x)
        elif (
            x.is_cpu
            and x.dtype in plain
            and x.is_contiguous()
            and not (x.is_neg() or x.is_conj())
            and (sizes := min(x.shape, default=2))
            and not x.data_ptr() % _ALIGNMENT
            and not (_pinning and x.is_pinned())
        ):
            if sizes == 1:  # strides of such sizes are arbitrary, and XLA would read them
                x = x.view(-1).view(x.shape)
            arrays.append(import_capsule(to_capsule(x)))
        else:
            arrays.append(_array(x, i))
    return arrays


def _array(x: torch.Tensor, i: int) -> Any:
    try:
        return t2j(x)
    except Torch2JaxError as error:
        error.operand = i  # type: ignore[attr-defined]  # whoever knows its name adds it
        raise


def to_tensors(arrays: Sequence[Any], on_cpu: bool) -> list[torch.Tensor]:
    """Results as tensors in the same memory; on a CPU they are computed when this returns."""
    return [
        from_capsule(export_capsule(x)) if on_cpu and x.dtype in _EXPORTED else j2t(x)
        for x in arrays
    ]


_pinning = torch.cuda.is_available()
