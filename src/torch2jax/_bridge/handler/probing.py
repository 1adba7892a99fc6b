"""XLA's stream on a GPU is what a handler sees there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch


def xla_stream(seen: Callable[[int], int | None], target: str, device: int) -> int | None:
    """Return the handle of XLA's stream on a GPU, by PyTorch's number; None where JAX has it not.

    Any call there has noted it, and ``seen`` returns it. Before the first call a small program runs
    there; ``target`` is a custom call that notes it.
    """
    stream = seen(device)
    if stream is None:
        for found in gpus():
            if found.local_hardware_id == device:
                _probe(found, target)
                return seen(device)
    return stream


def gpus() -> list[Any]:
    """Return the GPUs that JAX has in this process."""
    try:
        return jax.local_devices(backend="rocm" if torch.version.hip else "cuda")
    except RuntimeError:
        return []


def _probe(device: Any, target: str) -> None:
    shape = jax.ShapeDtypeStruct((2,), np.uint32)

    def note(x: Any) -> Any:
        return jax.ffi.ffi_call(target, shape, has_side_effect=True)(x, site=np.int64(0))

    with jax.ensure_compile_time_eval():
        x = jax.device_put(np.zeros(2, np.uint32), device)
        jax.block_until_ready(jax.jit(note)(x))
