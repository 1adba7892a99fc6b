"""A recurrent layer in a trace is a scan for each direction, where PyTorch has all steps.

PyTorch makes such layers of single steps before they come to ``__torch_dispatch__``: a program of a
thousand steps would have ten thousand operators. So kernels for autograd's keys take the layers
whole while a program is traced. In eager mode, and where something looks at the parts, PyTorch's
own steps run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jax.core import Tracer

from ..._compat.torch import dispatch_modes, eager
from ..._conversions.dtypes import canonical
from ..._conversions.float64 import is_carried
from ...lowerings import recurrent
from ..tensors.tensor import Tensor, captures
from ..thread_state import state
from .jax_function import apply_jax
from .operands import from_other_device, note_read

__all__ = ["KERNELS"]

aten = torch.ops.aten


def _scanned(kind: str) -> dict[str, Callable[..., Any]]:
    packet = getattr(aten, kind)

    def of_padded(
        x: Any, hx: Any, params: Any, biases: bool, layers: int, dropout: float, train: bool,
        both: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        states = _list(hx)
        if not _takes((x, *states, *params)) or x.ndim != 3 or not x.numel():
            return packet.input.decompose(
                x, hx, params, biases, layers, dropout, train, both, batch_first
            )
        _note(packet.input)
        steps = x.transpose(0, 1) if batch_first else x
        out, ends = _stack(kind, steps, states, params, biases, layers, dropout, train, both, None)
        return (out.transpose(0, 1) if batch_first else out, *ends)

    def of_packed(
        data: Any, sizes: Any, hx: Any, params: Any, biases: bool, layers: int, dropout: float,
        train: bool, both: bool,
    ) -> Any:  # fmt: skip
        states = _list(hx)
        if not _takes((data, *states, *params)) or not data.numel():
            return packet.data.decompose(
                data, sizes, hx, params, biases, layers, dropout, train, both
            )
        _note(packet.data)
        each = sizes.tolist()
        steps = apply_jax(
            lambda a: recurrent.pad(a[0], each, len(each)), [data], is_carried(data.dtype)
        )
        out, ends = _stack(kind, steps, states, params, biases, layers, dropout, train, both, each)
        return (_packed(out, each), *ends)

    return {f"{kind}.input": of_padded, f"{kind}.data": of_packed}


def _packed(out: Any, sizes: Any) -> Any:
    return apply_jax(lambda a: recurrent.pack(a[0], sizes), [out], is_carried(out.dtype))


def _stack(
    kind: str, x: Any, states: Sequence[Any], params: Sequence[Any], biases: bool, layers: int,
    dropout: float, train: bool, both: bool, sizes: Any,
) -> Any:  # fmt: skip
    """Run all layers. Return the outputs of the last one, and the end of each state."""
    cast = None
    if torch.is_autocast_enabled("jax"):
        cast = canonical(torch.get_autocast_dtype("jax"))
    directions = 2 if both else 1
    each = len(params) // (layers * directions)
    ends: list[Any] = []
    for i in range(layers):
        found = []
        for reverse in (False, True)[:directions]:
            n = i * directions + reverse
            operands = [x, *[s[n] for s in states], *params[n * each : (n + 1) * each]]

            def run(arrays: list[Any], reverse: bool = reverse) -> Any:
                k = 1 + len(states)
                return recurrent.layer(
                    kind, arrays[0], arrays[1:k], arrays[k:],
                    biases=biases, reverse=reverse, sizes=sizes, cast=cast,
                )  # fmt: skip

            wide = is_carried(x.dtype) and cast is None
            out, end = apply_jax(run, [from_other_device(a) for a in operands], wide)
            found.append(out)
            ends.append(end)
        x = torch.cat(found, -1) if both else found[0]
        if dropout and train and i < layers - 1:
            x = torch.dropout(x, dropout, True)
    return x, [torch.stack(s) for s in zip(*ends, strict=True)]


def _pad_packed(data: Any, sizes: Any, batch_first: bool, filling: Any, total: int) -> Any:
    """Gather once in a trace, where PyTorch copies sequence by sequence."""
    if not _takes((data,)) or not data.numel() or 0 < total < len(sizes):
        return aten._pad_packed_sequence.default.decompose(data, sizes, batch_first, filling, total)
    each = sizes.tolist()
    steps = max(total, len(each))
    out = apply_jax(
        lambda a: recurrent.pad(a[0], each, steps, filling), [data], is_carried(data.dtype)
    )
    lengths = (sizes[:, None] > torch.arange(each[0], device="cpu")).sum(0)
    return out.transpose(0, 1) if batch_first else out, lengths


def _takes(operands: Sequence[Any]) -> bool:
    """Say whether an operand is traced and nothing wants to see the parts."""
    ours = [x for x in operands if type(x) is Tensor]
    if captures:
        note_read(ours)
    if not any(isinstance(x._cell.array, Tracer) for x in ours):
        return False
    return eager() and dispatch_modes() <= state.watches


def _note(op: Any) -> None:
    if state.events is not None and not state.composite:
        state.events.add(op, "native")


def _list(hx: Any) -> list[Any]:
    return list(hx) if isinstance(hx, list | tuple) else [hx]


KERNELS: dict[str, Callable[..., Any]] = {"_pad_packed_sequence": _pad_packed}
"""Kernels for autograd's keys, by the operator's name."""
for _kind in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    KERNELS.update(_scanned(_kind))
