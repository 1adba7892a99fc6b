"""Memory of a GPU outlives what streams still do with it, on both sides.

NOTE [Lifetimes on a GPU]. Each side gives memory away as soon as nothing refers to it, and trusts
that its own stream does one thing after the other. What the other side has queued is on another
stream. So PyTorch's allocator is told that XLA's stream uses a tensor's memory (``record_stream``),
and XLA's stream waits for PyTorch's before an array's memory goes back (``cpp/handler/release.h``).
Which stream XLA's is, the handler knows: see ``_bridge/handler/probing.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_xla_stream: Callable[[int], int | None]
_order_release: Callable[[Any], Any]


def order_by(xla_stream: Callable[[int], int | None], order_release: Callable[[Any], Any]) -> None:
    """Have these functions say which stream XLA's is, and order the release of a capsule."""
    global _xla_stream, _order_release
    _xla_stream, _order_release = xla_stream, order_release


def find_stream(device: int) -> None:
    """See to it that XLA's stream on a GPU is known, by which memory goes back in order."""
    _xla_stream(device)


def lend(tensor: torch.Tensor) -> None:
    """Let PyTorch's memory stay as it is until XLA's stream is done with it.

    The stream's work counts that is queued when the memory is freed.
    """
    index = tensor.device.index
    stream = _xla_stream(index)
    if stream is not None and tensor.numel():
        tensor.record_stream(_external(stream, index))


@functools.cache
def _external(stream: int, device: int) -> Any:
    return torch.cuda.ExternalStream(stream, device=device)


class Borrowed:
    """An array on a GPU as PyTorch imports it: its memory goes back in the order of streams."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack_device__(self) -> tuple[Any, int]:
        return self._array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        index = self.__dlpack_device__()[1]
        _xla_stream(index)  # it is known when the memory goes back
        with torch.cuda.device(index):
            return _order_release(self._array.__dlpack__(**options))


def borrowed(array: Any) -> torch.Tensor:
    """Return a tensor in the memory of an array on a GPU."""
    return torch.from_dlpack(Borrowed(array))
