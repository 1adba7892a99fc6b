"""``x.requires_grad`` under ``lower=True`` and ``device.jit`` says whether JAX differentiates it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from torch2jax import device, from_module, torch2jax

device.enable()


def straight_through(x: Any) -> Any:
    """Round, with the gradient of the identity, as quantisers do."""
    q = x.round()
    return x + (q - x).detach() if x.requires_grad else q


def force(w: Any, x: Any) -> Any:
    """Differentiate inside, with a graph only where a derivative is wanted of it."""
    graph = torch.is_grad_enabled() and w.requires_grad
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(torch.tanh(w * x), x, create_graph=graph)[0]


@pytest.mark.parametrize("jit", [False, True])
def test_a_function_that_asks_whether_a_gradient_is_wanted(jit: bool) -> None:
    wrap = jax.jit if jit else lambda f: f
    gradient = wrap(jax.grad(lambda x: torch2jax(straight_through, lower=True)(x).sum()))
    assert gradient(jnp.asarray([0.3, 1.7])).tolist() == [1.0, 1.0]

    def right(w: Any, x: Any) -> Any:
        return jax.grad(lambda x: jnp.tanh(w * x))(x)

    found = wrap(jax.grad(torch2jax(force, lower=True)))(0.7, 0.3)
    np.testing.assert_allclose(found, jax.grad(right)(0.7, 0.3), rtol=1e-5)


def test_a_module_that_asks_about_its_parameters() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.3, 1.7]))

        def forward(self, x: Any) -> Any:
            return x * straight_through(self.weight)

    apply, variables = from_module(Quantised(), lower=True)
    grads = jax.grad(lambda v: apply(v, jnp.ones(2)).sum())(variables)
    assert grads["params"]["weight"].tolist() == [1.0, 1.0]


def test_what_ends_a_derivative() -> None:
    seen: list[Any] = []

    def fn(x: Any, n: Any) -> Any:
        with torch.no_grad():
            off = x * 2
        seen[:] = [
            x.requires_grad, (x * 2).requires_grad, x[0].requires_grad, x.detach().requires_grad,
            off.requires_grad, n.requires_grad, x.detach().requires_grad_().requires_grad,
            (x > 0).requires_grad, torch.ones(2).requires_grad,
        ]  # fmt: skip
        return x

    torch2jax(fn, lower=True)(jnp.ones(2), jnp.arange(2))
    assert seen == [True, True, True, False, False, False, True, False, False]


def test_device_jit() -> None:
    x = torch.tensor([0.3, 1.7], device="jax", requires_grad=True)
    compiled = device.jit(straight_through)
    for _ in range(3):
        x.grad = None
        compiled(x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [1.0, 1.0]
    asked = device.jit(lambda x, y: (x * 2, torch.tensor(y.requires_grad)))
    for _ in range(3):
        assert not asked(x, x.detach())[1].item()
        assert asked(x, x)[1].item()


def test_a_checkpoint_that_asks() -> None:
    from torch.utils.checkpoint import checkpoint

    def fn(x: Any) -> Any:
        return checkpoint(lambda z: z.sin() * z, x * 1.0, use_reentrant=True).sum()

    found = jax.grad(torch2jax(fn, lower=True))(jnp.asarray([0.5, 1.0]))
    x = np.asarray([0.5, 1.0])
    np.testing.assert_allclose(found, np.cos(x) * x + np.sin(x), rtol=1e-5)
