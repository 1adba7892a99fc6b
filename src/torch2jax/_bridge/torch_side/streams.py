"""A call of ``fn`` on a GPU works on the stream of the XLA program around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .ambient import run_guarded


def run_on_stream(
    body: Callable[..., Any],
    args: tuple[Any, ...],
    stream: int,
    device_index: int,
    default_dtype: torch.dtype,
) -> Any:
    """Run ``body(*args)`` in a clean state, with ``stream`` as torch's current one of the device.

    The handler orders it after work that torch has queued on its own stream, and before later work.
    """
    ours = torch.cuda.ExternalStream(stream, device=device_index)
    with torch.cuda.device(device_index), torch.cuda.stream(ours):
        return run_guarded(body, args, default_dtype)


def current_stream(device_index: int) -> int:
    """Return the address of torch's current stream of a device."""
    return torch.cuda.current_stream(device_index).cuda_stream
