"""Libraries of these tests are in a folder of their own, which all of them share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from recorded import recorded

__all__ = ["recorded"]


@pytest.fixture(autouse=True, scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of the compiled libraries."""
    before = os.environ.get("TORCH2JAX_CACHE_DIR")
    folder = Path(before) if before else tmp_path_factory.mktemp("libraries")
    os.environ["TORCH2JAX_CACHE_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["TORCH2JAX_CACHE_DIR"]
