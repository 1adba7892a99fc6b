"""JAX and PyTorch each have an allocator of their own on a GPU, and share its memory.

The doctor tells what the two will do here, and which variable to set. JAX reads its variables when
it starts; jaxlib's ``generate_pjrt_gpu_plugin_options`` says which.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .._bridge.handler.extension import TARGET
from .._bridge.torch_side.tape.table import default_budget, tape_info
from .diagnosis import Check

_DEFAULT_FRACTION = 0.75
_LARGE_FRACTION = 0.6
"""JAX leaves too little of a GPU to PyTorch where it takes more than this part."""


def allocators(gpu: Any, environment: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """Yield what the two allocators do on a GPU of JAX's."""
    total = _total(gpu.local_hardware_id)
    kind = environment.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default").lower()
    given = (
        environment.get("XLA_CLIENT_MEM_FRACTION"),
        environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION"),
    )
    if all(given):
        yield _check(
            "fraction",
            "failed",
            "XLA_CLIENT_MEM_FRACTION and XLA_PYTHON_CLIENT_MEM_FRACTION are both set, and JAX "
            "refuses that",
            "Unset the latter, which is the older name.",
        )
        return
    fraction = float(given[0] or given[1] or _DEFAULT_FRACTION)
    at_once = kind in ("default", "bfc") and (
        environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "") not in ("false", "False", "0")
    )
    if kind == "platform":
        yield _check(
            "allocator",
            "warning",
            "XLA_PYTHON_CLIENT_ALLOCATOR=platform asks the driver for every array",
            "Leave it unset.",
        )
    elif kind in ("default", "bfc"):
        yield from _shares(total, fraction, at_once)
    else:
        yield _check("JAX's", "info", f"XLA_PYTHON_CLIENT_ALLOCATOR={kind} takes what arrays need")
    yield from _of_torch(total, fraction if at_once else 0.0, environment)
    yield _tape(gpu.local_hardware_id)


def _shares(total: int | None, fraction: float, at_once: bool) -> Iterator[Check]:
    part = f"{fraction:.0%}" if total is None else f"{_gib(fraction * total)} of {_gib(total)}"
    if at_once and fraction > _LARGE_FRACTION:
        yield _check(
            "preallocation",
            "warning",
            f"JAX takes {part} of a GPU's memory at its start; PyTorch's activations have to fit "
            "into the rest",
            "Set XLA_PYTHON_CLIENT_PREALLOCATE=false, or XLA_CLIENT_MEM_FRACTION=.4 to what JAX "
            "needs for parameters, optimizer state, inputs and results.",
        )
    elif at_once:
        yield _check("JAX's", "info", f"takes {part} of a GPU's memory at its start")
    else:
        yield _check(
            "JAX's",
            "info",
            f"takes what arrays need, {part} at most (XLA_CLIENT_MEM_FRACTION), and keeps it",
        )


def _of_torch(total: int | None, taken: float, environment: Mapping[str, str]) -> Iterator[Check]:
    rest = "what is left" if total is None else f"what is left, {_gib((1 - taken) * total)} at most"
    yield _check(
        "PyTorch's",
        "info",
        f"takes {rest}, for the tape's activations, workspaces and tensors of your own, and keeps "
        "it for later ones",
    )
    set_by = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the second from torch 2.9 on
    if not any("expandable_segments" in environment.get(name, "") for name in set_by):
        yield _check(
            "fragments",
            "info",
            "PyTorch's blocks have fixed sizes, so memory in pieces may not serve a large tensor",
            f"Set {set_by[0]}=expandable_segments:True.",
        )


def _tape(number: int) -> Check:
    given = tape_info().budget
    if given is None and not torch.cuda.is_available():
        return _check("tape", "info", "PyTorch does not reach the GPU, so nothing is kept there")
    budget = default_budget(torch.device("cuda", number)) if given is None else given
    return _check(
        "tape",
        "info",
        f"up to {_gib(budget)} of activations on the GPU, by {TARGET.upper()}_TAPE_BYTES or "
        "set_tape_budget()",
    )


def _total(number: int) -> int | None:
    return torch.cuda.mem_get_info(number)[1] if torch.cuda.is_available() else None


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _check(name: str, status: str, detail: str, remedy: str = "") -> Check:
    return Check("Memory", name, status, detail, remedy)
