"""This package has conversions and user-defined operators under torchax's names."""

from __future__ import annotations

from . import mappings, ops_registry

__all__ = ["mappings", "ops_registry"]
