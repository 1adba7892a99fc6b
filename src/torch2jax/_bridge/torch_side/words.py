"""The host reads words of a device, tokens and keys, and knows where a call is.

This file imports torch, never JAX.

A read waits for the GPU. So the handler reads, which knows on which stream the words are written,
and lets other threads run Python meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..._compat.torch import numbers

Site = tuple[int, int, int]
"""An execution of a program, a device, and a place in the program."""

_call_site: Callable[[], Site | None]
_execution: Callable[[], int]
_read: Callable[[int, int], Sequence[int] | None]


def read_by(
    call_site: Callable[[], Site | None],
    execution: Callable[[], int],
    read: Callable[[int, int], Sequence[int] | None],
) -> None:
    """Have these functions of the extension say where a call is, and read."""
    global _call_site, _execution, _read
    _call_site, _execution, _read = call_site, execution, read


def execution() -> int:
    """Return the program's execution whose call this thread is in; 0: none."""
    return _execution()


def call_site() -> Site | None:
    """Return the site of the call that this thread is in, where it is one on a GPU.

    A call that keeps a graph and the call that takes it have one site, if the program says that the
    token of the second comes from the first.
    """
    return _call_site()


def words_of(x: torch.Tensor) -> Sequence[int]:
    """Return the words of a key or a token, which is a plain tensor of uint32 in one row."""
    if x.is_cuda and x.dtype is torch.uint32 and x.is_contiguous():
        words = _read(x.data_ptr(), x.numel())
        if words is not None:
            return words
    return numbers(x)
