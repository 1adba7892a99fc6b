"""Under ``lower=True`` the program's "cpu" is where its tensors are: a move to it moves nothing.

Libraries ask a buffer of theirs for the device, and one outside of the ``state_dict`` is a constant
on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from torch2jax import Torch2JaxError, from_module, torch2jax

MOVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cpu": lambda x: x.cpu() * x,
    "to": lambda x: x.to("cpu") * x,
    "to, a dtype too": lambda x: x.to("cpu", torch.float16).float() * x,
    "to, a copy": lambda x: x.to(device="cpu", copy=True).add_(x) * x,
    "to another": lambda x: x.to(torch.ones(1)) * x,
    "back": lambda x: x.cpu().to(x.device) * x,
}


@pytest.mark.parametrize("name", list(MOVES))
def test_moves_to_the_cpu(name: str) -> None:
    x = torch.linspace(-1, 2, 5, requires_grad=True)
    want = MOVES[name](x)
    want.sum().backward()
    f = torch2jax(MOVES[name], lower=True)
    a = jnp.asarray(x.detach().numpy())
    for run in (f, jax.jit(f)):
        np.testing.assert_allclose(run(a), want.detach(), rtol=1e-6)
    grad = jax.jit(jax.grad(lambda a: f(a).sum()))(a)
    np.testing.assert_allclose(grad, x.grad, rtol=1e-3)


class Asks(nn.Module):
    """It moves its input and its submodules to where its buffer is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("place", torch.empty(0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layer.to(self.place.device)
        return self.layer(x.to(self.place.device))


def test_a_buffer_that_says_where() -> None:
    torch.manual_seed(0)
    module, x = Asks(), torch.randn(4, 3)
    module(x).square().sum().backward()
    apply, variables = from_module(module, lower=True)

    def loss(params: Any) -> Any:
        return (apply({**variables, "params": params}, jnp.asarray(x.numpy())) ** 2).sum()

    for name, g in jax.jit(jax.grad(loss))(variables["params"]).items():
        np.testing.assert_allclose(g, module.get_parameter(name).grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "ask", [lambda x: x.cpu().numpy(), lambda x: x.to("cpu").tolist()], ids=["numpy", "tolist"]
)
def test_values_are_refused(ask: Callable[[torch.Tensor], Any]) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        ask(x)
        return x

    with pytest.raises(Torch2JaxError, match="asks for the values"):
        jax.jit(torch2jax(fn, lower="strict"))(jnp.ones(3))
