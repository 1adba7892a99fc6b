"""What all checks use: the device, and a way to keep it busy."""

from __future__ import annotations

import contextlib
import functools
import time
from typing import Any

Found = dict[str, str]
"""What a check found, as it stands on the page."""


@functools.cache
def on_gpu() -> bool:
    """Whether there is a GPU; a rehearsal has none."""
    import torch

    return torch.cuda.is_available()


def device() -> str:
    return "cuda" if on_gpu() else "cpu"


@functools.cache
def _cycles_of_a_millisecond() -> int:
    """Of the GPU's clock, by a kernel that only waits."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)
    begin.record()
    torch.cuda._sleep(100_000_000)
    end.record()
    end.synchronize()
    return int(100_000_000 / begin.elapsed_time(end))


def prepare() -> None:
    """Measure what ``busy`` needs, which waits for the GPU."""
    if on_gpu():
        _cycles_of_a_millisecond()


def busy(milliseconds: float) -> None:
    """Queue so much work on PyTorch's current stream; a CPU is busy itself, for less."""
    import torch

    if on_gpu():
        torch.cuda._sleep(int(milliseconds * _cycles_of_a_millisecond()))
    else:
        time.sleep(milliseconds / 1e5)


def new_stream() -> Any:
    """A context in which PyTorch's current stream is a new one, with that stream."""
    import torch

    return torch.cuda.stream(torch.cuda.Stream()) if on_gpu() else contextlib.nullcontext()


def synchronize() -> None:
    import torch

    if on_gpu():
        torch.cuda.synchronize()
