"""Models that the tests of the adapters train, and how PyTorch trains them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

REASON = "the extra `test` is not installed"
optax = pytest.importorskip("optax", reason=REASON)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def normed() -> nn.Module:
    """With buffers that move and, in front, parameters that are frozen."""
    module = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    module[0].requires_grad_(False)
    return module


def data(rows: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    return x, np.stack([x.sum(1), x[:, 0] * x[:, 1]], 1)


def trained_by_torch(module: nn.Module, steps: int, x: Any, y: Any) -> tuple[Any, list[float]]:
    """The module's state after some steps of torch's own AdamW, and the losses before each."""
    module = copy.deepcopy(module)
    held = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(held, lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((module(torch.from_numpy(x)) - torch.from_numpy(y)) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return module.state_dict(), losses


def adamw() -> Any:
    return optax.adamw(1e-2, weight_decay=0.1)


def assert_states_equal(got: Any, expected: Any) -> None:
    assert list(got) == list(expected)
    for name, t in expected.items():
        assert got[name].dtype is t.dtype
        torch.testing.assert_close(got[name], t, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: n + m)
