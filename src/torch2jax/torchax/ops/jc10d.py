"""Lowerings of collectives are registered under torchax's name; ``device`` has its own."""

from __future__ import annotations

from .jaten import op

__all__ = ["op"]
