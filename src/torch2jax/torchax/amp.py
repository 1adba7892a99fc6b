"""Mixed precision under torchax's names."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["autocast"]


def autocast(device_type: str = "jax", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """``torch.autocast`` for device jax."""
    return torch.autocast(device_type, dtype, **options)
