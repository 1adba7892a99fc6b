"""On PYTHONPATH, this gives a process and its children the extension that T2J_EXTENSION names.

However the package is installed: tools/sanitize.py runs tests with extensions of its own.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from typing import Any

_FILE = os.environ["T2J_EXTENSION"]
_NAME = "torch2jax._ext"


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, _FILE) if name == _NAME else None


sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
