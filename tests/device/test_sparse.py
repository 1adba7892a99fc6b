"""Gradients that PyTorch makes sparse on request are dense on device "jax", compiled ones too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import close

from torch2jax import device

device.enable()

Lookup = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LOOKUPS: dict[str, Lookup] = {
    "embedding": lambda i, w: F.embedding(i, w, sparse=True),
    "embedding, padded": lambda i, w: F.embedding(i, w, 2, sparse=True),
    "bag, sum": lambda i, w: F.embedding_bag(i[None], w, mode="sum", sparse=True),
    "bag, mean": lambda i, w: F.embedding_bag(i[None], w, mode="mean", sparse=True),
    "gather": lambda i, w: w.gather(0, i[:, None], sparse_grad=True),
}


def step(lookup: Lookup, i: torch.Tensor, w: torch.Tensor) -> tuple[Any, Any]:
    w = w.detach().clone().requires_grad_()
    loss = lookup(i, w).pow(3).sum()
    loss.backward()
    return loss.detach(), w.grad


@pytest.mark.parametrize("name", list(LOOKUPS))
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients(name: str, compiled: bool) -> None:
    lookup = LOOKUPS[name]
    i, w = torch.tensor([0, 2, 2]), torch.linspace(-1, 1, 12).reshape(4, 3)
    loss, grad = step(lookup, i, w)
    mine = functools.partial(step, lookup)
    run: Any = device.jit(mine) if compiled else mine
    for _ in range(2):
        ours, ours_grad = run(i.to("jax"), w.to("jax"))
        close(ours, loss)
        assert ours_grad.layout is torch.strided
        close(ours_grad, grad.to_dense())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_second_derivative(compiled: bool) -> None:
    def second(i: torch.Tensor, w: torch.Tensor) -> Any:
        w = w.detach().clone().requires_grad_()
        loss = F.embedding(i, w, sparse=True).pow(3).sum()
        (grad,) = torch.autograd.grad(loss, w, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), w)[0]

    i, w = torch.tensor([0, 2, 2]), torch.linspace(-1, 1, 12).reshape(4, 3)
    count = torch.tensor([1.0, 0, 2, 0])[:, None]
    run = device.jit(second) if compiled else second
    close(run(i.to("jax"), w.to("jax")), 36 * count**2 * w**3)
