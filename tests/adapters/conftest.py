"""The same random numbers for each of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from torch2jax import clear_tape


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    clear_tape()
