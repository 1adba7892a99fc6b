"""Fixtures of the whole suite."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

KNOWN_FAILURES = Path(__file__).parent / "known_failures.txt"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Expected failures are listed in one file, under their reasons."""
    reason, known = "", {}
    for line in KNOWN_FAILURES.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            reason = line.removeprefix("#").strip()
        elif line:
            known[line] = reason
    for item in items:
        why = known.get(item.nodeid.rpartition("/")[2])
        if why is not None:
            item.add_marker(pytest.mark.xfail(reason=why, strict=False))


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request: pytest.FixtureRequest) -> bool:
    """64-bit types off, as JAX starts, and on."""
    return request.param


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory() -> Iterator[None]:
    """What a file compiled is dropped after it: thousands of executables take gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()
