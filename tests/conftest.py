"""Fixtures of the whole suite."""

from __future__ import annotations

import pytest


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request: pytest.FixtureRequest) -> bool:
    """64-bit types off, as JAX starts, and on."""
    return request.param
