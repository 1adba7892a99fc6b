"""What all tests of a process share and each has to leave as it was: a later test would pay for it."""

from __future__ import annotations

from typing import Any

import jax
import torch
from jax.interpreters import mlir

from torch2jax._bridge.jax_side.primitive import torch_call_p

_SETTINGS = (
    *("jax_enable_x64", "jax_default_device", "jax_disable_jit", "jax_debug_nans"),
    *("jax_numpy_dtype_promotion", "jax_default_matmul_precision"),
)


def _described(rule: Any) -> Any:
    """A lowering, so that two which are made alike are equal."""
    return getattr(rule, "func", rule), getattr(rule, "keywords", None)


def _lowerings() -> dict[str, Any]:
    tables = {"any": mlir._lowerings, **mlir._platform_specific_lowerings}
    entries = {p: table[torch_call_p] for p, table in tables.items() if torch_call_p in table}
    return {p: _described(getattr(entry, "rule", entry)) for p, entry in entries.items()}


def process_state() -> dict[str, Any]:
    """Settings of JAX and PyTorch, and the lowerings of a call."""
    return {
        **{name: getattr(jax.config, name) for name in _SETTINGS},
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "modes": torch._C._len_torch_dispatch_stack(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "lowerings": _lowerings(),
    }


def changes(before: dict[str, Any]) -> dict[str, Any]:
    """What is no longer as it was, with what it was and what it is."""
    after = process_state()
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}
