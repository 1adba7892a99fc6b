"""What the tests of torchax's names share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import pytest

from torch2jax import torchax


@pytest.fixture
def installed() -> Iterator[None]:
    """Let ``import torchax`` find our module, until the test is over."""
    classes = {}
    for part in torchax._PARTS:
        module = importlib.import_module(f"torch2jax.torchax.{part}")
        for name in module.__all__:
            if isinstance(getattr(module, name), type):
                classes[getattr(module, name)] = getattr(module, name).__module__
    before = dict(sys.modules)
    torchax.install()
    yield
    for kind, name in classes.items():
        kind.__module__ = name
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in ("torchax", "torch_xla2"):
            del sys.modules[name]
