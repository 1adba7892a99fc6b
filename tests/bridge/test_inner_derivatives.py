"""Functions that ask autograd for gradients themselves, and old-style autograd.Functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.autograd import forward_ad, grad

from torch2jax import TorchCallError, from_module, torch2jax

X = jnp.array([0.3, -0.5, 0.9])

pytestmark = pytest.mark.filterwarnings("ignore:.*called row by row under jax.vmap")


def energy(x: torch.Tensor) -> torch.Tensor:
    return (torch.sin(x) * x.sum()).sum()


def jax_force(x: jax.Array) -> jax.Array:
    return jax.grad(lambda x: (jnp.sin(x) * x.sum()).sum())(x)


def by_backward(x: torch.Tensor) -> torch.Tensor:
    leaf = x.detach().requires_grad_()
    energy(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


FORCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda x: grad(energy(x), x, create_graph=True)[0],
    "requires_grad_": lambda x: grad(energy(x.requires_grad_()), x, create_graph=True)[0],
    "under enable_grad": torch.enable_grad()(lambda x: _watched(x)),
}


def _watched(x: torch.Tensor) -> torch.Tensor:
    x = x if x.requires_grad else x.detach().requires_grad_()
    return grad(energy(x), x, create_graph=True)[0]


@pytest.mark.parametrize("declared", [False, True], ids=["inferred", "declared"])
@pytest.mark.parametrize("name", list(FORCES))
def test_forces(name: str, declared: bool) -> None:
    f = torch2jax(FORCES[name], output_shapes=X if declared else None)
    transforms: tuple[Callable[[Any], Any], ...] = (
        lambda f: f,
        jax.jit,
        jax.jacrev,
        jax.jacfwd,
        lambda f: jax.jit(jax.grad(lambda x: (f(x) ** 2).sum())),
        lambda f: jax.hessian(lambda x: (f(x) ** 2).sum()),
        lambda f: lambda x: jax.jvp(f, (x,), (x**2,))[1],
        lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])),
        lambda f: lambda x: jax.vmap(jax.jacrev(f))(jnp.stack([x, 2 * x])),
    )
    for transform in transforms:
        np.testing.assert_allclose(
            transform(f)(X), transform(jax_force)(X), rtol=2e-4, atol=1e-5, err_msg=name
        )


def pushed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A derivative along a direction: autograd saves wrappers, which have no storage."""
    return torch.func.jvp(lambda y: (y * w).tanh() @ w, (x,), (torch.ones_like(x) + w,))[1]


def jacobian(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.func.jacfwd(lambda y: (y * w).tanh() * y.sum())(x) @ (w + 1)


def dual(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        y = forward_ad.make_dual(x, torch.ones_like(x) + w)
        return forward_ad.unpack_dual((y * w).tanh() @ w).tangent


def jax_pushed(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.jvp(lambda y: jnp.tanh(y * w) @ w, (x,), (1 + w,))[1]


def jax_jacobian(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.jacfwd(lambda y: jnp.tanh(y * w) * y.sum())(x) @ (w + 1)


@pytest.mark.parametrize(
    ("fn", "twin"), [(pushed, jax_pushed), (dual, jax_pushed), (jacobian, jax_jacobian)]
)
def test_forward_mode_inside(fn: Any, twin: Any) -> None:
    f, w = torch2jax(fn), jnp.array([0.5, 0.2, -0.7])
    transforms: tuple[Callable[[Any], Any], ...] = (
        lambda f: f,
        lambda f: jax.grad(lambda *a: (f(*a) ** 2).sum(), (0, 1)),
        lambda f: jax.jit(jax.grad(lambda *a: (f(*a) ** 2).sum(), (0, 1))),
        lambda f: jax.hessian(lambda *a: (f(*a) ** 2).sum(), 1),
        lambda f: (
            lambda x, w: jax.vmap(jax.grad(lambda *a: f(*a).sum(), 1))(
                jnp.stack([x, 2 * x]), jnp.stack([w, w + 1])
            )
        ),
    )
    for transform in transforms:
        for actual, expected in zip(
            jax.tree.leaves(transform(f)(X, w)), jax.tree.leaves(transform(twin)(X, w)), strict=True
        ):
            np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-5)


def test_values_of_backward() -> None:
    np.testing.assert_allclose(torch2jax(by_backward)(X), jax_force(X), rtol=1e-5)


class Potential(torch.nn.Module):
    """Energies and forces, as models of molecules return them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x.requires_grad_()
        e = self.layers(x).sum()
        return e, -grad(e, x, create_graph=True)[0]


def test_forces_of_a_module() -> None:
    torch.manual_seed(0)
    module = Potential()
    x = torch.randn(4, 3)
    e, force = module(x.clone())
    (e + (force**2).sum()).backward()
    apply, variables = from_module(module)

    def loss(v: Any, x: Any) -> Any:
        e, force = apply(v, x)
        return e + (force**2).sum()

    found = apply(variables, x.numpy())
    np.testing.assert_allclose(found[0], e.item(), rtol=1e-5)
    np.testing.assert_allclose(found[1], force.detach().numpy(), rtol=1e-5, atol=1e-6)
    for run in (jax.grad(loss), jax.jit(jax.grad(loss))):
        got = run(variables, x.numpy())["params"]
        for name, p in module.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            np.testing.assert_allclose(got[name], expected.numpy(), rtol=1e-4, atol=1e-5)


class Penalty(torch.nn.Module):
    """A norm of the gradient in the parameters, which a caller's x need not require."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = grad(self.linear(x).pow(3).sum(), list(self.parameters()), create_graph=True)
        return torch.stack([(g**2).sum() for g in found]).sum()


def test_gradients_in_the_parameters() -> None:
    torch.manual_seed(0)
    module, x = Penalty(), torch.randn(4, 3)
    expected = module(x)
    expected.backward()
    apply, variables = from_module(module)
    np.testing.assert_allclose(apply(variables, x.numpy()), expected.item(), rtol=1e-5)
    got = jax.jit(jax.grad(apply))(variables, x.numpy())["params"]
    for name, p in module.named_parameters():
        assert p.grad is not None
        np.testing.assert_allclose(got[name], p.grad.numpy(), rtol=1e-4, atol=1e-4)


def test_what_is_wrong_stays_an_error() -> None:
    """A gradient of something that depends on nothing."""
    f = torch2jax(lambda x: grad(x.detach().sum(), x)[0])
    with pytest.raises(TorchCallError, match="does not require grad"):
        f(X)


# --- old-style Functions -------------------------------------------------------------------------


class Cube(torch.autograd.Function):
    """Without ``setup_context``: ``torch.func`` refuses it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * g


def test_old_style_functions() -> None:
    f = torch2jax(lambda x: Cube.apply(x) * x.sum())
    twin = lambda x: x**3 * x.sum()  # noqa: E731
    transforms: tuple[Callable[[Any], Any], ...] = (
        lambda f: lambda x: jax.jvp(f, (x,), (x**2,))[1],
        lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x**2,))[1]),
        jax.jacfwd,
        jax.jacrev,
        lambda f: jax.jacfwd(jax.jacfwd(f)),
        lambda f: jax.jacfwd(jax.jacrev(f)),
        lambda f: jax.jacrev(jax.jacfwd(f)),
        lambda f: jax.hessian(lambda x: f(x).sum()),
        lambda f: jax.jit(jax.hessian(lambda x: f(x).sum())),
        lambda f: lambda x: jax.vmap(jax.jacfwd(f))(jnp.stack([x, 2 * x])),
        lambda f: lambda x: jax.linearize(f, x)[1](x),
    )
    for i, transform in enumerate(transforms):
        np.testing.assert_allclose(
            transform(f)(X), transform(twin)(X), rtol=1e-4, atol=1e-5, err_msg=str(i)
        )


def test_old_style_functions_in_a_module() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Cube.apply(self.w * x)

    apply, variables = from_module(Model())
    w = variables["params"]["w"]
    push = lambda f: jax.jvp(f, (w,), (w**2,))[1]  # noqa: E731
    found = push(lambda w: apply({**variables, "params": {"w": w}}, X))
    np.testing.assert_allclose(found, push(lambda w: (w * X) ** 3), rtol=1e-5)
