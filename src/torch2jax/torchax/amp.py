"""This module offers mixed precision under torchax's names."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["autocast"]


def autocast(
    device: str = "jax", dtype: torch.dtype = torch.bfloat16, env: Any = None, **options: Any
) -> Any:
    """Return ``torch.autocast`` for device jax; it is the same in every environment."""
    return torch.autocast(options.pop("device_type", device), dtype, **options)
