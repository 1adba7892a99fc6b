"""What a model makes of nothing that is traced is computed at once, without a program of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torch2jax import device, torch2jax
from torch2jax.device.operators.dispatch import forget
from torch2jax.lowerings.registry import TABLE

X = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)


def causal(x: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    return x.masked_fill(~mask, torch.finfo(x.dtype).min).softmax(-1)


def buckets(x: torch.Tensor) -> torch.Tensor:
    """T5's buckets of relative positions."""
    far = torch.arange(4)[None] - torch.arange(4)[:, None]
    side, far = (far > 0).long() * 4, far.abs()
    large = 2 + (torch.log(far.float() / 2) / np.log(4) * 2).to(torch.long)
    large = torch.min(large, torch.full_like(large, 3))
    return x[side // 4] * torch.where(far < 2, far, large)[..., None]


def rotary(x: torch.Tensor) -> torch.Tensor:
    rate = 1.0 / (100 ** (torch.arange(0, 4, 2).float() / 4))
    angle = torch.outer(torch.arange(4).float(), rate).repeat(1, 2)
    return x * angle.cos() + x.roll(2, -1) * angle.sin()


def views(x: torch.Tensor) -> torch.Tensor:
    a = torch.arange(24.0).view(2, 3, 4)
    b = a[1].t()[:, ::2] + a.select(1, 2).unsqueeze(-1).expand(2, 4, 2)[0]
    left, right = a.permute(2, 0, 1).split([1, 3])
    return x + (b @ b.mT) + right.sum() - left.flatten()[1:3].mean()


def written(x: torch.Tensor) -> torch.Tensor:
    table = torch.zeros(4, 4)
    table[1:3, ::2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    table.diagonal().add_(1)
    return x * table.cumsum(0)


def numbers(x: torch.Tensor) -> torch.Tensor:
    values, places = torch.tensor([3, 1, 2, 0]).sort(descending=True)
    last = torch.tensor(2**31 - 1) - values
    return x[places] + (last % 7) + torch.linspace(0, 1, 4).to(torch.bfloat16)


def compiled(events: list[str]) -> int:
    return sum(event.endswith("backend_compile_duration") for event in events)


@pytest.mark.parametrize("fn", [causal, buckets, rotary, views, written, numbers])
def test_constants_are_those_of_pytorch(fn: Callable[..., Any]) -> None:
    lowered = jax.jit(torch2jax(fn, lower=True))
    expected = fn(torch.from_numpy(X))
    np.testing.assert_allclose(lowered(X), expected.float().numpy(), 1e-5, 1e-5)


def test_a_trace_compiles_one_program() -> None:
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event)
    )

    def biased(x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        far = (torch.arange(n)[None] - torch.arange(n)[:, None]).abs()
        return x + torch.ones(n, n).tril() * far.float().log1p()

    for n in (4, 5):
        x = jnp.ones((n, n))
        lowered = jax.jit(torch2jax(biased, lower=True))
        events.clear()
        np.testing.assert_allclose(lowered(x), biased(torch.ones(n, n)).numpy(), 1e-6)
    assert compiled(events) == 1


def test_a_lowering_of_the_users_computes_constants_too() -> None:
    """It may mean something else than PyTorch by the operator."""
    operator = torch.ops.aten.sinc.default
    before = TABLE.get(operator)
    device.register_lowering(operator, lambda x: x * 0 + 7)
    try:
        found = jax.jit(torch2jax(lambda x: x * 0 + torch.sinc(torch.ones(4)), lower=True))(X)
    finally:
        if before is None:
            del TABLE[operator]
        else:
            TABLE[operator] = before
        forget()
    np.testing.assert_array_equal(found, np.full((4, 4), 7, np.float32))
