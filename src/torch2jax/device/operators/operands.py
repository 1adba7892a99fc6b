"""A call is read as its operands (tensors and numbers) and a template of its other arguments."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..._conversions.float64 import admit
from ..._errors import Torch2JaxError
from ..tensors.tensor import Tensor, captures, from_torch, wrap
from ..thread_state import state

__all__ = [
    "NO_NESTED", "Slot", "cells_of", "fill", "from_other_device", "items_meet", "moved",
    "note_read", "read_argument",
]  # fmt: skip


class Slot:
    """A slot marks the place of an operand in a template of arguments."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


_slot = functools.cache(Slot)


def read_argument(x: Any, operands: list[Any], key: list[Any], takes_numbers: bool) -> Any:
    """Return the template of one argument: ``x`` with a slot in the place of each operand.

    The operands in ``x`` are appended to ``operands``, and all that selects a program to ``key``.
    The extension reads eager calls in the same way (cpp/device/eager_key.cc), and a test holds it
    to this function.
    """
    t = type(x)
    if t is Tensor:
        operands.append(x)
        chain = x._chain
        key += (_rank(x), None if chain is None else chain.pattern, x.dtype)
        return _slot(len(operands) - 1)
    if t is float or t is int:
        if takes_numbers and (t is float or -(2**31) <= x < 2**31):
            operands.append(x)
            key.append(t)
            return _slot(len(operands) - 1)
        key += (t, repr(x) if t is float else x)  # 0.0 == -0.0, and NaN is not equal to itself
        return x
    if isinstance(x, list | tuple):
        key += (list, len(x))
        return [read_argument(y, operands, key, takes_numbers) for y in x]
    if isinstance(x, torch.Tensor):
        x = from_other_device(x)
        operands.append(x)
        key += (_rank(x), None, x.dtype)
        return _slot(len(operands) - 1)
    key += (t, x)
    return x


def cells_of(operands: Sequence[Any]) -> list[int]:
    """Return for each operand the place of the first one with the same memory."""
    first: dict[int, int] = {}
    return [
        first.setdefault(id(x._cell if type(x) is Tensor else x), i) for i, x in enumerate(operands)
    ]


def _rank(x: torch.Tensor) -> str:
    """Tell tensors without dimensions apart, for which PyTorch promotes dtypes in another way."""
    return "tensor" if x.ndim else "number"


def items_meet(lists: Sequence[Sequence[Any]]) -> bool:
    """Say whether tensors at two places of lists share elements; a view counts as a whole span."""
    tensors = [(i, x) for xs in lists for i, x in enumerate(xs) if type(x) is Tensor]
    if len({id(x._cell) for _, x in tensors}) == len(tensors):
        return False
    spans: dict[int, list[tuple[int, int, int]]] = {}
    for i, x in tensors:
        stride: Any = x.stride()
        start: Any = x.storage_offset()
        reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, stride, strict=True))
        if x.numel():
            spans.setdefault(id(x._cell), []).append((start, start + reach, i))
    for found in spans.values():
        end, item = 0, -1
        for start, stop, i in sorted(found):
            if start < end and i != item:
                return True
            end, item = max(end, stop), i
    return False


def fill(x: Any, values: Sequence[Any]) -> Any:
    if type(x) is Slot:
        return values[x.index]
    if type(x) is list:
        return [fill(y, values) for y in x]
    return x


def from_other_device(x: torch.Tensor) -> Tensor:
    """Take a tensor of another device: a number, or with ``lower=True`` a constant."""
    if isinstance(x, Tensor):
        return x
    if x.is_nested:
        raise Torch2JaxError(NO_NESTED)
    if x.device.type == "meta" or type(x) not in _PLAIN:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, got one on {x.device} of type "
            f"{type(x).__name__} beside one on jax:0."
        )
    if x.ndim and not (state.lowering or state.other_devices):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, jax:0 "
            f'and {x.device}. Move the other one: tensor.to("jax").'
        )
    if x.ndim:  # PyTorch makes numbers of float64 by itself, and tensors decide the dtype
        admit(x.dtype, asked=False)
    if not state.lowering:
        return wrap(from_torch(x), x.dtype)
    # One trace makes one constant of a tensor, however often it is used. The tensor is kept, so
    # that its id stays its own.
    version = 0 if x.is_inference() else x._version
    cached = state.constants.get(id(x))
    if cached is None or cached[0] is not x or cached[1] != version:
        cached = state.constants[id(x)] = (x, version, from_torch(x))
    return wrap(cached[2], x.dtype)


def moved(x: Any) -> Any:
    """Return an argument, and where it is a tensor on the CPU what stands for it here."""
    cpu = isinstance(x, torch.Tensor) and type(x) is not Tensor and x.device.type == "cpu"
    return from_other_device(x) if cpu else x


NO_NESTED = (
    "nested tensors do not exist on device jax, whose arrays are dense: pad them "
    "(torch.nn.utils.rnn.pad_sequence), and give the model a padding mask."
)

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def note_read(operands: Sequence[Any]) -> None:
    """Tell ``device.jit`` what is read: memory from before a trace is an input of its program."""
    for x in operands:
        if type(x) is Tensor:
            for capture in captures:
                capture.read(x)
