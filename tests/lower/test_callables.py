"""Autograd functions that take a callable, which closes over tensors: integrals, solvers.

PyTorch knows by identity the closed-over tensors that are arguments, too; all others are constants
to the function's derivative. Values and all gradients are PyTorch's.
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

from torch2jax import device, from_module, torch2jax


class Integral(torch.autograd.Function):
    """The sum of f at three places between a and b; what f uses is passed beside it."""

    @staticmethod
    def forward(ctx: Any, f: Any, a: Any, b: Any, *used: Any) -> Any:
        ctx.f = f
        ctx.save_for_backward(a, b, *used)
        return Integral.total(f, a, b)

    @staticmethod
    def total(f: Any, a: Any, b: Any) -> Any:
        return sum(f(torch.lerp(a, b, torch.full_like(a, s))) for s in (0.2, 0.5, 0.9)) * (b - a)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        a, b, *used = ctx.saved_tensors
        grads = ()
        if used:
            with torch.enable_grad():
                total = Integral.total(ctx.f, a, b)
            grads = torch.autograd.grad(total, used, g)
        return None, -ctx.f(a) * g, ctx.f(b) * g, *grads


def of_parameters(self: Any, x: torch.Tensor) -> torch.Tensor:
    return Integral.apply(self.net, torch.zeros_like(x), x, *self.net.parameters())


def of_nothing_passed(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The parameters' gradients come from the second term alone."""
    return Integral.apply(self.net, torch.zeros_like(x), x) + self.net(x)


def of_what_was_computed(self: Any, x: torch.Tensor) -> torch.Tensor:
    """One factor is passed, which is a view, and another one is not."""
    scale, shift = self.net(x).chunk(2, 0)
    used = scale.exp()[0]
    f = lambda s: (s * used).sin() + shift  # noqa: E731
    return Integral.apply(f, x[:2], x[2:], used)


def of_an_integer(self: Any, x: torch.Tensor) -> torch.Tensor:
    chosen = x.sum(0).argsort()
    return Integral.apply(lambda s: self.net(s)[:, chosen], x - 1, x, *self.net.parameters())


def nested(self: Any, x: torch.Tensor) -> torch.Tensor:
    inner = lambda s: Integral.apply(torch.tanh, torch.zeros_like(s), s)  # noqa: E731
    weights = tuple(self.net.parameters())
    return Integral.apply(lambda s: inner(self.net(s)), torch.zeros_like(x), x, *weights)


class Uses(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run
        self.net = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


class Twice(torch.autograd.Function):
    """A function whose backward pass calls a function that takes the callable, and so on."""

    @staticmethod
    def forward(ctx: Any, f: Any, x: Any) -> Any:
        ctx.f = f
        ctx.save_for_backward(x)
        return f(x)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return None, Twice.apply(ctx.f, *ctx.saved_tensors) * g


def of_itself(self: Any, x: torch.Tensor) -> torch.Tensor:
    scale = self.net(x).exp()
    return Twice.apply(lambda s: (s * scale).exp(), x) + scale


PROGRAMS = [
    of_itself,
    of_parameters,
    of_nothing_passed,
    of_what_was_computed,
    of_an_integer,
    nested,
]


def expected(run: Callable[..., Any]) -> tuple[Uses, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    module, x = Uses(run), torch.randn(4, 3, requires_grad=True)
    out = module(x)
    out.square().sum().backward()
    return module, x, out


def close(actual: Any, wanted: torch.Tensor) -> None:
    np.testing.assert_allclose(np.asarray(actual), wanted.detach().numpy(), 1e-4, 1e-5)


@pytest.mark.parametrize("run", PROGRAMS)
def test_lowered(run: Callable[..., Any]) -> None:
    module, x, out = expected(run)
    apply, variables = from_module(module, lower=True)
    array = jnp.asarray(x.detach().numpy())
    close(apply(variables, array), out)

    def loss(params: Any, x: Any) -> Any:
        return (apply({**variables, "params": params}, x) ** 2).sum()

    for wrap in (lambda f: f, jax.jit):
        grads, slope = wrap(jax.grad(loss, (0, 1)))(variables["params"], array)
        close(slope, x.grad)
        for name, p in module.named_parameters():
            close(grads[name], p.grad)


@pytest.mark.parametrize("run", PROGRAMS)
def test_compiled_on_the_device(run: Callable[..., Any]) -> None:
    device.enable()
    module, x, out = expected(run)
    wanted = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    module = module.to("jax")

    @device.jit
    def step(x: torch.Tensor) -> Any:
        x = x.detach().requires_grad_()
        out = module(x)
        out.square().sum().backward()
        return out, x.grad

    for _ in range(2):  # the first call runs step by step
        module.zero_grad()
        result, slope = step(x.detach().to("jax"))
    close(result.detach().cpu(), out)
    close(slope.cpu(), x.grad)
    for name, p in module.named_parameters():
        close(p.grad.cpu(), wanted[name])


def test_an_error_of_the_backward_pass_is_one_of_the_derivative() -> None:
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, f: Any, x: Any) -> Any:
            return f(x)

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            raise ValueError("it has no derivative")

    f = torch2jax(lambda x: Refuses.apply(torch.sin, x), lower=True)
    np.testing.assert_allclose(jax.jit(f)(jnp.ones(3)), np.sin(np.ones(3)), rtol=1e-6)
    with pytest.raises(ValueError, match="it has no derivative"):
        jax.grad(lambda x: f(x).sum())(jnp.ones(3))
