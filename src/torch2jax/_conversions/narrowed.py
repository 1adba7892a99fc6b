"""While x64 is off JAX carries 64-bit dtypes as narrower ones. This file never imports JAX."""

from __future__ import annotations

import torch

NARROWED = {
    torch.int64: torch.int32,
    torch.uint64: torch.uint32,
    torch.float64: torch.float32,
    torch.complex128: torch.complex64,
}
"""JAX carries the first of each pair as the second while x64 is off."""

WIDENED = {narrow: wide for wide, narrow in NARROWED.items()}
"""The same pairs the other way round."""
