"""An empty tape for each of these tests, and a small module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from torch2jax import clear_tape, from_module


@pytest.fixture(autouse=True)
def fresh_tape():
    clear_tape()
    torch.manual_seed(0)
    yield
    clear_tape()


@pytest.fixture
def mlp() -> tuple[nn.Module, Any, Any]:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    apply, variables = from_module(module)
    return module, apply, variables
