"""PyTorch's 64-bit dtypes and what JAX carries in their place. Never imports JAX."""

from __future__ import annotations

import torch

NARROWED = {
    torch.int64: torch.int32,
    torch.uint64: torch.uint32,
    torch.float64: torch.float32,
    torch.complex128: torch.complex64,
}
"""What JAX makes of 64-bit dtypes while x64 is off."""

WIDENED = {narrow: wide for wide, narrow in NARROWED.items()}
"""The other way: the PyTorch dtype that JAX carries as this one while x64 is off."""
