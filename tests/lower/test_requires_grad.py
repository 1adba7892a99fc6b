"""``x.requires_grad`` under ``lower=True`` and ``device.jit`` says whether JAX differentiates it."""

from __future__ import annotations

import copy
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


class Frozen(nn.Module):
    """A layer whose bias is frozen, with a buffer, a tensor of its own and a written buffer."""

    scale: torch.Tensor
    last: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.layer.bias.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))
        self.register_buffer("last", torch.zeros(2))

    def flags(self) -> list[bool]:
        return [
            x.requires_grad for x in (*self.parameters(), self.scale, OWN[self.scale.device.type])
        ]

    def forward(self, x: Any) -> Any:
        return (self.layer(x) + OWN[x.device.type]) * self.scale


OWN = {name: torch.tensor([0.1, -0.2], device=name) for name in ("cpu", "jax")}


def asking_with_a_graph(model: Frozen, x: Any) -> Any:
    return model(x), model.flags()


def asking_after_backward(model: Frozen, x: Any) -> Any:
    y = model(x)
    y.square().sum().backward(retain_graph=True)
    return y, model.flags()


def asking_of_a_written_buffer(model: Frozen, x: Any) -> Any:
    model.last = model.last.detach()
    model.last.mul_(0.9).add_(model(x)[0])
    return model.last * 1.0, [*model.flags(), model.last.requires_grad]


@pytest.mark.parametrize(
    "fn", [asking_with_a_graph, asking_after_backward, asking_of_a_written_buffer]
)
def test_what_device_jit_closes_over_says_so_itself(fn: Any) -> None:
    torch.manual_seed(0)
    there: Any = Frozen()
    here: Any = copy.deepcopy(there).to("jax")
    compiled = device.jit(lambda x: fn(here, x))
    x = torch.tensor([[0.3, 1.7], [-1.0, 0.4]])
    for _ in range(3):
        want, flags = fn(there, x)
        got, found = compiled(x.to("jax"))
        assert found == flags
        assert here.flags() == there.flags()  # nothing is thawed for good
        np.testing.assert_allclose(got.detach().cpu(), want.detach(), 1e-5, 1e-6)
        for y in (want, got):
            y.square().sum().backward()
        for p, q in zip(here.parameters(), there.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None and q.grad is not None:
                np.testing.assert_allclose(p.grad.cpu(), q.grad, 1e-5, 1e-6)


def test_a_checkpoint_that_asks() -> None:
    from torch.utils.checkpoint import checkpoint

    def fn(x: Any) -> Any:
        return checkpoint(lambda z: z.sin() * z, x * 1.0, use_reentrant=True).sum()

    found = jax.grad(torch2jax(fn, lower=True))(jnp.asarray([0.5, 1.0]))
    x = np.asarray([0.5, 1.0])
    np.testing.assert_allclose(found, np.cos(x) * x + np.sin(x), rtol=1e-5)


# --- gradients by operands and parameters, which nothing made leaves ----------------------------


def penalised(w: Any, x: Any) -> Any:
    """The gradient of a gradient's square, by an operand."""
    (g,) = torch.autograd.grad((torch.tanh(w * x) * x).sum(), w, create_graph=True)
    return (g**2).sum()


def jax_penalised(w: Any, x: Any) -> Any:
    return (jax.grad(lambda w: (jnp.tanh(w * x) * x).sum())(w) ** 2).sum()


def asked_late(w: Any, x: Any) -> Any:
    """It asks of ``w`` whose first use is before, and is content with no gradient."""
    y = (w * w * x).sum()
    leaf = w if w.requires_grad else torch.zeros_like(w, requires_grad=True)
    y = y + torch.sin(w * x).sum()
    (g,) = torch.autograd.grad(y, leaf, create_graph=True, allow_unused=True)
    return w.sum() * 0 if g is None else (g * w).sum()


def jax_asked_late(w: Any, x: Any) -> Any:
    return (jax.grad(lambda w: (w * w * x + jnp.sin(w * x)).sum())(w) * w).sum()


W, X = jnp.asarray([0.7, -0.4]), jnp.asarray([0.3, 1.7])


@pytest.mark.parametrize(("fn", "twin"), [(penalised, jax_penalised), (asked_late, jax_asked_late)])
def test_gradients_by_an_operand(fn: Any, twin: Any) -> None:
    lowered = torch2jax(fn, lower=True)
    transforms: list[Any] = [
        lambda f: f,
        jax.jit,
        lambda f: jax.grad(f, (0, 1)),
        lambda f: jax.jit(jax.grad(f, (0, 1))),
        lambda f: jax.hessian(f),
        lambda f: lambda w, x: jax.vmap(jax.grad(f), (0, None))(jnp.stack([w, 2 * w]), x),
    ]
    for i, transform in enumerate(transforms):
        for found in (lowered, torch2jax(fn, lower=True)):  # the first knows already
            pairs = zip(
                jax.tree.leaves(transform(found)(W, X)),
                jax.tree.leaves(transform(twin)(W, X)),
                strict=True,
            )
            for got, want in pairs:
                np.testing.assert_allclose(got, want, 2e-4, 1e-5, err_msg=str(i))


class Adapted(nn.Module):
    """A step of gradient descent in the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Any) -> Any:
        loss = self.linear(x).pow(3).sum()
        grads = torch.autograd.grad(loss, list(self.parameters()), create_graph=True)
        weight, bias = (p - 0.1 * g for p, g in zip(self.parameters(), grads, strict=True))
        return nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize("variables_are_arguments", [True, False])
def test_gradients_by_parameters(variables_are_arguments: bool) -> None:
    torch.manual_seed(0)
    module, x = Adapted(), torch.randn(4, 3, requires_grad=True)
    want = module(x)
    want.square().sum().backward()
    assert x.grad is not None
    y = jnp.asarray(x.detach().numpy())
    if not variables_are_arguments:
        value, slope = jax.jit(
            jax.value_and_grad(lambda x: (torch2jax(module, lower=True)(x) ** 2).sum())
        )(y)
    else:
        apply, variables = from_module(module, lower=True)
        loss = lambda v, x: (apply(v, x) ** 2).sum()  # noqa: E731
        value, (grads, slope) = jax.jit(jax.value_and_grad(loss, (0, 1)))(variables, y)
        for name, p in module.named_parameters():
            assert p.grad is not None
            np.testing.assert_allclose(grads["params"][name], p.grad, 1e-4, 1e-4, err_msg=name)
    np.testing.assert_allclose(value, want.detach().square().sum(), rtol=1e-4)
    np.testing.assert_allclose(slope, x.grad, 1e-4, 1e-4)


def test_a_gradient_of_what_depends_on_nothing_stays_an_error() -> None:
    fn = torch2jax(lambda x: torch.autograd.grad(x.detach().sum(), x)[0], lower=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        fn(W)
