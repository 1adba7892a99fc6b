"""Programs of other people's libraries on the bridge: values and all gradients are PyTorch's."""

from __future__ import annotations

from typing import Any

import e3nn.math
import e3nn.nn
import e3nn.util.jit
import gpytorch
import jax
import jax.numpy as jnp
import library_derivatives as derivatives
import library_programs as programs
import numpy as np
import pytest
import pytorch_tcn
import torch
import torchdiffeq
import torchrecurrent
from e3nn import o3
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


PROGRAMS = programs.PROGRAMS | derivatives.PROGRAMS


@pytest.mark.parametrize("name", programs.named("bridge", PROGRAMS))
def test_program(name: str) -> None:
    program = PROGRAMS[name]
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


@pytest.mark.parametrize("make", programs.WITH_GENERATORS)
def test_a_generator_of_a_library(make: Any) -> None:
    """It has a seed of its own, which no key changes."""
    torch.manual_seed(0)
    module, y = make()
    y.requires_grad_()
    want = module(y)
    want.square().sum().backward()
    apply, variables = from_module(module)
    x = jnp.asarray(y.detach().numpy())

    def loss(params: Any, x: Any, key: Any) -> Any:
        return (apply({**variables, "params": params}, x, rng=key) ** 2).sum()

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    for seed in range(2):
        value, (grads, slope) = step(variables["params"], x, jax.random.key(seed))
        np.testing.assert_allclose(value, want.detach().square().sum(), rtol=1e-5)
        programs.close(slope, y.grad, "input")
        for name, p in module.named_parameters():
            programs.close(grads[name], p.grad, name)


def traced_convolutions() -> tuple[torch.nn.Module, Any, torch.Tensor]:
    module = pytorch_tcn.TCN(3, [4, 4], kernel_size=3, use_norm="batch_norm", dropout=0.0).eval()
    x = programs.randn(2, 3, 12)
    return module, torch.jit.trace(module, x), x


def traced_recurrence() -> tuple[torch.nn.Module, Any, torch.Tensor]:
    module, x = torchrecurrent.MGU(3, 4), programs.randn(4, 2, 3)
    return module, torch.jit.trace(module, x), x


def scripted_cell() -> tuple[torch.nn.Module, Any, torch.Tensor]:
    module = torchrecurrent.MGUCell(3, 4)
    return module, torch.jit.script(module), programs.randn(2, 3)


def scripted_irreps() -> tuple[torch.nn.Module, Any, torch.Tensor]:
    module = torch.nn.Sequential(
        o3.Linear("2x0e + 1x1o", "1x0e + 2x1o"), o3.Norm("1x0e + 2x1o"), o3.Linear("3x0e", "2x0e")
    )
    return module, e3nn.util.jit.script(module), programs.randn(3, 5)


def scripted_gate() -> tuple[torch.nn.Module, Any, torch.Tensor]:
    """Its activations have numbers that a script asks for."""
    module = e3nn.nn.Gate("2x0e", [torch.tanh], "2x0e", [torch.sigmoid], "2x1o")
    return module, e3nn.util.jit.script(module), programs.randn(3, 10)


def first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple | list) else out


@pytest.mark.parametrize("lower", [False, True], ids=["bridge", "lower"])
@pytest.mark.parametrize(
    "make",
    [traced_convolutions, traced_recurrence, scripted_cell, scripted_irreps, scripted_gate],
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript_of_a_library(make: Any, lower: bool) -> None:
    torch.manual_seed(0)
    module, compiled, x = make()
    x.requires_grad_()
    want = first(module(x))
    want.square().sum().backward()
    apply, variables = from_module(compiled, lower=lower)

    def loss(params: Any, x: Any) -> Any:
        return (first(apply({**variables, "params": params}, x)) ** 2).sum()

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, (grads, slope) = step(variables["params"], jnp.asarray(x.detach().numpy()))
    np.testing.assert_allclose(value, want.detach().square().sum(), rtol=1e-5)
    programs.close(slope, x.grad, "input")
    for name, p in module.named_parameters():
        programs.close(grads[name], p.grad, name)
