"""A GPU whose memory runs out: what is kept for speed makes room, and an error says who has what.

PyTorch and JAX each keep what they have taken of the card. JAX takes three quarters of it at its
first use, unless ``XLA_PYTHON_CLIENT_PREALLOCATE`` or ``XLA_CLIENT_MEM_FRACTION`` says
otherwise.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import torch

from ..torch_side.tape.table import tape
from .probing import gpus


def make_room(device: int) -> None:
    """Give back to a GPU what PyTorch keeps there without need; a call that failed runs again."""
    gc.collect()  # what the call that failed left in cycles
    tape.evict(torch.device("cuda", device))
    torch.cuda.empty_cache()


def describing(
    describe: Callable[[str, BaseException], str],
) -> Callable[[str, BaseException], str]:
    """Return ``describe``, which gives an error of memory a note on the card's allocators first."""

    def described(label: str, error: BaseException) -> str:
        if isinstance(error, torch.OutOfMemoryError):
            with contextlib.suppress(Exception):  # a note is no reason to lose the error
                error.add_note(report(torch.cuda.current_device()))
        return describe(label, error)

    return described


def report(device: int) -> str:
    """Return a sentence for each allocator of a GPU."""
    free, total = torch.cuda.mem_get_info(device)
    used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    lines = [
        f"GPU {device} has {_size(total)}, of which {_size(free)} are free.",
        f"PyTorch has taken {_size(reserved)} and uses {_size(used)} of them; "
        f"the tape holds {_size(tape.bytes_on(torch.device('cuda', device)))}.",
    ]
    for found in gpus():
        stats = found.memory_stats() if found.local_hardware_id == device else None
        if stats:
            taken = stats.get("pool_bytes", stats.get("bytes_reserved", stats["bytes_in_use"]))
            lines.append(
                f"JAX has taken {_size(max(taken, stats['bytes_in_use']))}, uses "
                f"{_size(stats['bytes_in_use'])} of them and may take "
                f"{_size(stats.get('bytes_limit', 0))}."
            )
    lines.append(
        "XLA_CLIENT_MEM_FRACTION=0.5 (or another part), set before JAX starts, leaves more "
        "of the card to PyTorch; XLA_PYTHON_CLIENT_PREALLOCATE=false lets JAX take memory as it "
        "needs it."
    )
    return "\n".join(lines)


def _size(n: Any) -> str:
    return f"{int(n) / 2**20:,.0f} MiB"
