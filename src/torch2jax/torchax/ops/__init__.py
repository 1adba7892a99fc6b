"""Conversions and operators of one's own under torchax's names."""

from __future__ import annotations

from . import mappings, ops_registry

__all__ = ["mappings", "ops_registry"]
