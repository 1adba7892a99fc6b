"""`x.data` on device "jax": the memory without autograd's knowledge, as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from harness import close
from torch import nn

from torch2jax import Torch2JaxError, device, t2j, torch2jax

device.enable()


def numbers() -> torch.Tensor:
    return torch.arange(1.0, 7.0).reshape(2, 3)


class SavesViewOfResult(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        ctx.save_for_backward(y[:1], x.view(-1))
        y.data[0] = 5.0
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        first, flat = ctx.saved_tensors
        return grads[0] * first * flat.view(grads[0].shape)


class SavesOperand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, x[1:])
        x.data[0] = 5.0
        return x * 3

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        x, last = ctx.saved_tensors
        return grads[0] * x * last


def saved_view(x: torch.Tensor) -> torch.Tensor:
    part = x[1:]
    out = (part * part).sum()
    x.data[1] = 4.0
    return out


def data_of_a_view(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    squares = y[0].exp()
    y[:, 1:].data.mul_(3)
    return (y * y).sum() + squares.sum()


FUNCTIONS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: SavesViewOfResult.apply(x),  # type: ignore[list-item]
    lambda x: SavesOperand.apply(x * 1),  # type: ignore[list-item]
    saved_view,
    data_of_a_view,
]


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_writes_are_hidden_from_autograd(fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x, mine = numbers().requires_grad_(), numbers().to("jax").requires_grad_()
    expected, out = fn(x), fn(mine)
    expected.sum().backward()
    out.sum().backward()
    close(out, expected)
    close(mine, x)
    close(mine.grad, x.grad)


def test_writes_are_hidden_from_jax() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.data[0] = x[1] * 3
        return (y * y).sum()

    x = numbers().requires_grad_()
    expected = fn(x)
    expected.backward()
    value, gradient = jax.value_and_grad(torch2jax(fn, lower=True))(t2j(x.detach()))
    close(value, expected)
    close(gradient, x.grad)


def test_it_is_the_memory_with_a_version_of_its_own() -> None:
    for where in ("cpu", "jax"):
        x = numbers().to(where)
        data = x.data
        data[0] = 7
        assert (x._version, data._version) == (0, 1)
        assert x[0].tolist() == [7.0, 7.0, 7.0]
        part = x[:, 1]
        part.data.zero_()
        assert x[:, 1].tolist() == [0.0, 0.0]


def test_of_a_parameter() -> None:
    p = nn.Parameter(torch.ones(3, device="jax"))
    p.data.mul_(2)
    p.data[0] = 9
    assert p.tolist() == [9.0, 2.0, 2.0]
    assert not p.data.requires_grad
    assert not isinstance(p.data, nn.Parameter)
    p.data = torch.zeros(2, device="jax")
    assert p.tolist() == [0.0, 0.0]


def test_in_a_compiled_step() -> None:
    def step(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        p.data[0] += x[0]
        p.data.add_(1)
        return (p * x).sum()

    p, mine = torch.ones(3), torch.ones(3, device="jax")
    x = torch.arange(1.0, 4.0)
    compiled = device.jit(lambda x: step(mine, x))
    for _ in range(3):
        close(compiled(x.to("jax")), step(p, x))
        close(mine, p)


def test_lists_of_tensors_become_a_tensor() -> None:
    """As tensorly makes signs of its components."""
    x = numbers().to("jax")
    rows = [[x[0, 0], 2.5], [x[1, 1], x.sum()]]
    for out in (torch.tensor(rows), torch.tensor(rows, device="jax"), torch.as_tensor(rows)):
        assert out.tolist() == [[1.0, 2.5], [5.0, 21.0]]
    assert torch.tensor([x[0, 0].long(), 3]).tolist() == [1, 3]
    with pytest.raises(Torch2JaxError, match="being traced"):
        torch2jax(lambda x: torch.tensor([x[0], x[1]]), lower=True)(jnp.ones(2))
