"""Fixtures of the whole suite."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Before jax starts: the tests of several devices share one CPU.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Before torch is loaded: its threads would wait for each other's work in a loop, and the workers of
# pytest have more threads together than there are cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# On a busy machine first traces take long and would say so, also in programs whose output is compared.
os.environ.setdefault("TORCH2JAX_PROGRESS", "0")

import jax
import pytest
from compiling import EVERYTHING, quickly
from process_state import changes, process_state

from torch2jax import clear_tape

LONG = (
    *("lower/test_lowerings.py", "package/test_examples.py", "package/test_docs.py"),
    *("transforms/test_control.py", "bridge/test_operators.py", "extension/test_alias.py"),
    *("lower/test_layers.py", "lower/test_bridged_modules.py", "bridge/test_distributed.py"),
    *("bridge/test_lifetimes.py", "bridge/test_fuzz.py", "lower/test_libraries.py"),
    *("bridge/test_libraries.py", "device/test_libraries.py", "bridge/test_huggingface.py"),
    *(
        "bridge/tape/test_memory.py",
        "torchax/test_torchax.py",
        "bridge/modules/test_torchscript.py",
    ),
)
"""Files that take long, the longest first: no worker is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first, then those with the most tests. `make test` keeps to this order."""
    root = Path(__file__).parent
    rank = {root / name: i for i, name in enumerate(LONG)}
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (rank.get(item.path, len(rank)), -count[item.path], item.path))


def pytest_collection_finish() -> None:
    """What was imported stays: without it a collection, of which tests make hundreds, is quick."""
    gc.collect()
    gc.freeze()


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
    clear_tape()


@pytest.fixture(autouse=True, scope="module")
def _compiled_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """See NOTE [Compiled quickly]."""
    if EVERYTHING or request.node.get_closest_marker("optimized"):
        yield
        return
    with quickly():
        yield


@pytest.fixture(autouse=True)
def _process_left_as_it_was() -> Iterator[None]:
    """The test that changes what all share fails, and not those after it."""
    before = process_state()
    yield
    assert not changes(before)
