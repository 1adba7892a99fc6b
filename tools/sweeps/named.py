"""Models whose tiny configuration or input the rules of `tiny` do not find."""

from __future__ import annotations

from typing import Any

FIXED: dict[str, dict[str, Any]] = {}
SUBJECTS: dict[str, Any] = {}
