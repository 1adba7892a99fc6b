"""An empty tape for each of these tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from tape_functions import SMALL

from torch2jax import Torch2JaxWarning, clear_tape, set_tape_budget
from torch2jax._bridge.torch_side.tape import programs, table


@pytest.fixture(autouse=True)
def fresh_tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    clear_tape()
    monkeypatch.setattr(programs, "_SMALL", 0)  # a few numbers stand for many: see `small`
    yield
    set_tape_budget(None)
    clear_tape()
    # One test's miscount is not the next one's: `test_bytes_...` look at the counts.
    table.tape._accounts.clear()


@pytest.fixture
def small(fresh_tape: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small graphs are kept on copies, as outside of these tests."""
    monkeypatch.setattr(programs, "_SMALL", SMALL)


@pytest.fixture
def x() -> jax.Array:
    return jnp.linspace(0.1, 1.0, 6)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Reentrant checkpoints warn where no gradient is asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        warnings.simplefilter("ignore", Torch2JaxWarning)
        yield
