"""PyTorch's operators are functions of arrays under torchax's names.

``_aten_NAME(*args)`` is the operator ``torch.ops.aten.NAME`` of arrays, with the arguments of its
PyTorch signature, for every name that PyTorch has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ...lowerings.registry import TABLE
from ..calls import call_torch
from .ops_registry import all_aten_ops as all_ops
from .ops_registry import register_torch_dispatch_op

__all__ = ["all_ops", "op"]

_PREFIX = "_aten_"
_table = dict(TABLE)
_softmax: Any = _table[torch.ops.aten._softmax.default].fn
_convolution: Any = _table[torch.ops.aten.convolution.default].fn


def op(*aten: Any, **options: Any) -> Callable[[Any], Any]:
    """Register the decorated function for these operators; see ``register_torch_dispatch_op``."""

    def register(func: Any) -> Any:
        for one in aten:
            register_torch_dispatch_op(one, func, **options)
        return func

    return register


def _aten_conv2d(
    input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Any:
    """Convolve arrays. A size may be one number, and ``padding`` may be "same" or "valid"."""
    if isinstance(padding, str):
        which = torch.ops.aten.conv2d.padding
        rest = (_sizes(stride, 2), padding, _sizes(dilation, 2), groups)
        return call_torch(which, input, weight, bias, *rest)
    return _aten_convolution(input, weight, bias, stride, padding, dilation, False, 0, groups)


def _aten_convolution(
    input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> Any:  # fmt: skip
    """Convolve arrays of any number of dimensions. A size may be one number."""
    n = weight.ndim - 2
    sizes = [_sizes(x, n) for x in (stride, padding, dilation)]
    more = _sizes(output_padding if transposed else 0, n)
    return _convolution(input, weight, bias, *sizes, transposed, more, groups)


def _aten_softmax(x: Any, dim: int, halftofloat: bool = False) -> Any:
    """Return the softmax of an array along one dimension; ``halftofloat`` has no effect."""
    return _softmax(x, dim, False)


def _sizes(x: Any, n: int) -> list[int]:
    return [x] * n if isinstance(x, int) else list(x)


def __getattr__(name: str) -> Any:
    packet = getattr(torch.ops.aten, name.removeprefix(_PREFIX), None)
    if not name.startswith(_PREFIX) or packet is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # A user's function in the place of an operator may call what was there before.
    found = _table.get(getattr(packet, packet.overloads()[0]))
    return functools.partial(call_torch, packet) if found is None or found.random else found.fn
