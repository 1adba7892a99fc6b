"""Recurrent layers in ``device.jit``: a whole training step, packed sequences, second order."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from torch2jax import device

device.enable()

KINDS: dict[str, Any] = {
    "lstm": lambda: nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True),
    "gru": lambda: nn.GRU(4, 6, num_layers=2, batch_first=True),
    "rnn": lambda: nn.RNN(4, 6, bidirectional=True, batch_first=True),
}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    np.testing.assert_allclose(a.detach().cpu(), b.detach().cpu(), 2e-5, 2e-5)


def packed(layer: Any, x: torch.Tensor) -> Any:
    rows = pack_padded_sequence(x, torch.tensor([2, 5, 4]), True, enforce_sorted=False)
    return pad_packed_sequence(layer(rows)[0], True)[0]


def padded(layer: Any, x: torch.Tensor) -> Any:
    return layer(x)[0]


@pytest.mark.parametrize("run", [padded, packed])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step(kind: str, run: Any) -> None:
    torch.manual_seed(0)
    there = KINDS[kind]()
    here = copy.deepcopy(there).to("jax")
    x = torch.randn(3, 5, 4)

    def step_of(model: Any) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(x: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss = run(model, x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    plain, compiled = step_of(there), device.jit(step_of(here))
    for _ in range(3):
        close(compiled(x.to("jax")), plain(x))
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        close(p, q)


@pytest.mark.parametrize("run", [padded, packed])
def test_gradients_of_a_compiled_module(run: Any) -> None:
    torch.manual_seed(0)
    there = KINDS["gru"]()
    here = copy.deepcopy(there).to("jax")
    x = torch.randn(3, 5, 4)
    compiled = device.jit(lambda x: run(here, x))
    for _ in range(3):
        a, b = x.to("jax").requires_grad_(), x.clone().requires_grad_()
        compiled(a).square().sum().backward()
        run(there, b).square().sum().backward()
        close(a.grad, b.grad)  # type: ignore[arg-type]
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        close(p.grad, q.grad)  # type: ignore[arg-type]


def test_the_gradient_of_a_gradient() -> None:
    torch.manual_seed(0)
    there = nn.LSTM(4, 6)
    here = copy.deepcopy(there).to("jax")

    def penalty_of(layer: Any) -> Any:
        def penalty(x: torch.Tensor) -> torch.Tensor:
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(layer(x)[0].sin().sum(), x, create_graph=True)
            g.square().sum().backward()
            return g.detach()

        return penalty

    compiled, plain = device.jit(penalty_of(here)), penalty_of(there)
    x = torch.randn(5, 3, 4)
    for _ in range(3):
        close(compiled(x.to("jax")), plain(x))
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        close(p.grad, q.grad)  # type: ignore[arg-type]


def test_a_jax_function_has_derivatives_of_derivatives() -> None:
    import jax.numpy as jnp

    x = torch.tensor([0.3, 1.0, -2.0])
    a, b = x.clone().requires_grad_(), x.to("jax").requires_grad_()
    (g,) = torch.autograd.grad(torch.sin(a).square().sum(), a, create_graph=True)
    (h,) = torch.autograd.grad(
        device.call_jax(lambda x: jnp.sin(x) ** 2, b).sum(), b, create_graph=True
    )
    close(h, g)
    (g2,) = torch.autograd.grad((g**2).sum(), a)
    (h2,) = torch.autograd.grad((h**2).sum(), b)
    close(h2, g2)
