"""Tensors to arrays and back at the speed of a call: `t2j` and `j2t` without their checks.

What is plain goes straight to DLPack; everything else (GPUs, other layouts, float8, 64-bit values
with x64 off, whatever is an error) goes through `t2j` and `j2t`, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._compat import cpu_device, export_capsule, import_capsule
from ._convert import j2t, t2j
from ._dtypes import dtype_t2j
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


def to_arrays(operands: Sequence[Any], x64: bool) -> tuple[list[Any], bool]:
    """Operands as JAX takes them: tensors as arrays, other values as they are.

    Also whether results are in a CPU's memory, for all that is known: there are tensors, all there.
    """
    check_may_call_jax("a jax2torch function")
    plain, device = _PLAIN[x64], cpu_device()
    arrays: list[Any] = []
    here = elsewhere = False
    for x in operands:
        if type(x) in _TYPES:
            if (
                x.is_cpu
                and x.dtype in plain
                and x.is_contiguous()
                and (address := x.data_ptr())  # 0: it is empty
                and not address % _ALIGNMENT
                and not (x.is_neg() or x.is_conj())
                and not (_pinning and x.is_pinned())
            ):
                here = True
                if 1 in x.shape:  # strides of such sizes are arbitrary, and XLA would read them
                    x = x.view(-1).view(x.shape)
                arrays.append(import_capsule(to_capsule(x), device, None))
                continue
        elif not isinstance(x, torch.Tensor):
            arrays.append(x)
            continue
        here, elsewhere = True, elsewhere or not x.is_cpu
        arrays.append(_array(x, len(arrays)))
    return arrays, here and not elsewhere


def _array(x: torch.Tensor, i: int) -> Any:
    try:
        return t2j(x)
    except Torch2JaxError as error:
        error.operand = i  # type: ignore[attr-defined]  # whoever knows its name adds it
        raise


def to_tensors(arrays: Sequence[Any], dtypes: frozenset[Any], on_cpu: bool) -> list[torch.Tensor]:
    """Results, of those dtypes, as tensors in their memory; on a CPU they are computed then."""
    if on_cpu and dtypes <= _EXPORTED:
        return [from_capsule(export_capsule(x)) for x in arrays]
    return [j2t(x) for x in arrays]


_pinning = torch.cuda.is_available()
