"""Programs of other people's libraries on the bridge: values and all gradients are PyTorch's."""

from __future__ import annotations

from typing import Any

import gpytorch
import jax
import jax.numpy as jnp
import library_programs as programs
import numpy as np
import pytest
import pytorch_tcn
import torch
import torchdiffeq
import torchsde
from ncps.torch import LTC, CfC
from ncps.wirings import AutoNCP

from torch2jax import from_module, torch2jax

# They deprecate what PyTorch deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:Sparse (invariant checks|CSR tensor support)",
    "ignore:Converting sparse tensor to CSR format",
    # captum, of an argument that requires no gradient
    "ignore:Input Tensor 0 did not already require gradients",
)


@pytest.mark.parametrize("name", programs.named("bridge"))
def test_program(name: str) -> None:
    program = programs.PROGRAMS[name]
    module = programs.made(program)
    want = programs.expected(module, program)
    apply, variables = from_module(module)
    programs.check(apply, variables, program, want)


def agrees(fn: Any, *args: Any) -> None:
    """Value and gradient of the first argument are PyTorch's, eager and compiled."""
    leaves = [torch.from_numpy(np.array(x)) for x in args]
    leaves[0].requires_grad_()
    want = fn(*leaves)
    want.square().sum().backward()
    for compiled in (lambda f: f, jax.jit):
        out = compiled(torch2jax(lambda *a: fn(*a)))(*args)
        np.testing.assert_allclose(out, want.detach(), rtol=1e-4, atol=1e-5)
        f = torch2jax(lambda *a: fn(*a))
        grad = compiled(jax.grad(lambda *a: (f(*a) ** 2).sum()))(*args)  # noqa: B023
        np.testing.assert_allclose(grad, leaves[0].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_torchdiffeq(method: str) -> None:
    """Times must increase, steps are accepted or not, and their size is a number."""
    rates = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    agrees(
        lambda y, t: torchdiffeq.odeint(lambda _, y: y @ rates, y, t, method=method),
        jnp.ones(2),
        jnp.linspace(0.0, 1.0, 4),
    )


def test_gpytorch() -> None:
    """A covariance must be positive definite, and points in training are told by their values."""
    points = torch.linspace(0, 1, 5)

    def log_probability(y: torch.Tensor) -> torch.Tensor:
        covariance = gpytorch.kernels.RBFKernel()(points).to_dense() + 0.1 * torch.eye(5)
        prior = gpytorch.distributions.MultivariateNormal(torch.zeros(5), covariance)
        return prior.log_prob(y)

    agrees(log_probability, jnp.linspace(0.0, 1.0, 5))


@pytest.mark.parametrize(
    "make", [lambda: LTC(3, AutoNCP(8, 2)), lambda: CfC(3, 8)], ids=["LTC", "CfC"]
)
def test_liquid_networks(make: Any) -> None:
    torch.manual_seed(0)
    module, x = make(), torch.randn(2, 4, 3)
    apply, variables = from_module(module)
    want = module(x)[0]
    want.square().sum().backward()
    loss = lambda p: (apply({**variables, "params": p}, jnp.asarray(x))[0] ** 2).sum()  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"])
    np.testing.assert_allclose(value, want.detach().square().sum(), rtol=1e-5)
    for name, p in module.named_parameters():
        if p.grad is not None:
            np.testing.assert_allclose(grads[name], p.grad, rtol=1e-3, atol=1e-4, err_msg=name)


class Noisy(torch.nn.Module):
    noise_type, sde_type = "diagonal", "ito"

    def __init__(self) -> None:
        super().__init__()
        self.drift, self.diffusion = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def f(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.drift(y)

    def g(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.diffusion(y))


def test_a_generator_of_a_library() -> None:
    """torchsde draws from generators with seeds of its own, which no key changes."""
    torch.manual_seed(0)
    equation = Noisy()

    def solve(y: torch.Tensor) -> torch.Tensor:
        noise = torchsde.BrownianInterval(0.0, 1.0, size=tuple(y.shape), dtype=y.dtype, entropy=1)
        times = torch.linspace(0, 1, 3)
        return torchsde.sdeint(equation, y, times, bm=noise, method="euler", dt=0.25)

    y = torch.linspace(-1, 1, 6).reshape(2, 3).requires_grad_()
    want = solve(y)
    want.square().sum().backward()
    f = torch2jax(solve, stochastic=True)
    x = jnp.asarray(y.detach().numpy())
    for seed in range(2):
        key = jax.random.key(seed)
        value, grad = jax.jit(jax.value_and_grad(lambda x, k: (f(x, rng=k) ** 2).sum()))(x, key)
        np.testing.assert_allclose(value, want.detach().square().sum(), rtol=1e-5)
        np.testing.assert_allclose(grad, y.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_module_of_a_library(lower: bool) -> None:
    torch.manual_seed(0)
    module = pytorch_tcn.TCN(3, [4, 4], kernel_size=3, use_norm="batch_norm", dropout=0.0).eval()
    x = torch.linspace(-1, 1, 72).reshape(2, 3, 12)
    traced = torch.jit.trace(module, x)
    module(x).square().sum().backward()
    apply, variables = from_module(traced, lower=lower)
    loss = lambda p: (apply({**variables, "params": p}, jnp.asarray(x)) ** 2).sum()  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"])
    np.testing.assert_allclose(value, module(x).detach().square().sum(), rtol=1e-5)
    for name, p in module.named_parameters():
        np.testing.assert_allclose(grads[name], p.grad, rtol=1e-3, atol=1e-4, err_msg=name)
