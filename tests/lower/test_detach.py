"""Where JAX's derivative ends under `lower=True`: at what the user detaches, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torch2jax import Torch2JaxError, device, torch2jax

W = torch.tensor([0.7, 0.4, 0.2, 0.9])
X = torch.tensor([0.3, 0.5, 0.6, 0.8])


def in_an_attribute(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (w * x.data * x).sum()


def a_method(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (w * (w * x).detach() * x).sum()


def a_function(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (w * torch.detach(w * x) * x).sum()


def in_place(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    y.detach_()
    return (y * x).sum()


def inside_of_a_library_function(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    soft = (w * x).softmax(0)
    hard = F.one_hot(soft.argmax(), 4).to(soft.dtype)
    return ((hard - soft.detach() + soft) * x).sum()


def a_block_without_gradients(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = w * x
    return (y * x).sum()


def views_made_without_gradients(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        first, second = x.split(2)
        turned = x.view(2, 2).t()
    return (w[:2] * first * x[2:]).sum() + (second * w[:2]).sum() + (turned * w.view(2, 2)).sum()


def data_written_to(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    y.data.mul_(2)
    y.data[1] = 3.0
    return (y * y).sum()


def data_replaced(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = (w * x) ** 2
    y.data = y.data * 3 + x.detach()
    return (y * y * w).sum()


def memory_replaced(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = (w * x) ** 2
    with torch.no_grad():
        y.set_(y * 3 + x)
    return (y * y * w).sum()


def its_own_data(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = (w * x) ** 2
    y.data = y.data.contiguous()
    return (y * y * w).sum()


def data_of_an_argument_replaced(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    w.data = w.data * 2
    return (w**3 * x).sum()


def a_detached_tensor_written_to(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = (w * x).detach()
    y += w
    y.mul_(x)
    return (y * y).sum()


def memory_written_to_without_gradients(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    with torch.no_grad():
        y[0] = 5.0
        y[1:].mul_(2)
    return (y * y).sum()


def inside_of_a_gradient(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda x: (torch.tanh(w * x).detach() * torch.exp(x * w)).sum())(x).sum()


def without_a_graph(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = (x * 1).requires_grad_() if not x.requires_grad else x
    with torch.enable_grad():
        (g,) = torch.autograd.grad(torch.tanh(w * y).sum(), y)
    return (g * w).sum()


USERS = [
    in_an_attribute, a_method, a_function, in_place, inside_of_a_library_function,
    a_block_without_gradients, views_made_without_gradients, data_written_to, data_replaced,
    memory_replaced, its_own_data, data_of_an_argument_replaced,
    a_detached_tensor_written_to, memory_written_to_without_gradients, inside_of_a_gradient,
    without_a_graph,
]  # fmt: skip


def right(fn: Callable[..., Any], *args: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in args]
    out = fn(*leaves)
    found = torch.autograd.grad(out, leaves, allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(args, found, strict=True)),
    ]


def agree(found: Any, expected: list[torch.Tensor]) -> None:
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(got), want.numpy(), rtol=2e-5, atol=2e-6)


def by_lower(fn: Callable[..., Any], *args: torch.Tensor) -> list[Any]:
    both = tuple(range(len(args)))
    value, found = jax.value_and_grad(torch2jax(fn, lower=True), both)(
        *[jnp.asarray(x.numpy()) for x in args]
    )
    return [value, *found]


def by_the_device(fn: Callable[..., Any], *args: torch.Tensor) -> list[Any]:
    value, found = device.value_and_grad(fn, tuple(range(len(args))))(
        *[device.tensor(jnp.asarray(x.numpy())) for x in args]
    )
    return [value.jax(), *(g.jax() for g in found)]


def in_a_loop(f: Any) -> Any:
    return lambda w, x: jax.lax.scan(lambda c, _: (c, f(w, x)), 0.0, None, 1)[1][0]


@pytest.mark.parametrize("run", [by_lower, by_the_device])
@pytest.mark.parametrize("fn", USERS)
def test_what_the_user_detaches(fn: Any, run: Any) -> None:
    agree(run(fn, W, X), right(fn, W, X))


@pytest.mark.parametrize("loop", [lambda f: f, jax.jit, in_a_loop], ids=["eager", "jit", "loop"])
@pytest.mark.parametrize("fn", USERS)
def test_second_derivatives_of_what_the_user_detaches(fn: Any, loop: Any) -> None:
    leaves = [W.clone().requires_grad_(), X.clone().requires_grad_()]
    found = torch.autograd.grad(fn(*leaves), leaves, create_graph=True, allow_unused=True)
    slope = torch.cat([torch.zeros(4) if g is None else g for g in found])
    want = [
        torch.cat([torch.zeros(4) if h is None else h for h in rows])
        for rows in (
            torch.autograd.grad(g, leaves, retain_graph=True, allow_unused=True)
            if g.requires_grad
            else (None, None)
            for g in slope
        )
    ]
    f = loop(torch2jax(fn, lower=True))
    both = jnp.concatenate([jnp.asarray(W.numpy()), jnp.asarray(X.numpy())])
    for again in (jax.jacfwd, jax.jacrev):
        curvature = again(jax.grad(lambda z: f(z[:4], z[4:])))(both)
        np.testing.assert_allclose(curvature, torch.stack(want).numpy(), 2e-5, 2e-5)


def test_a_write_to_memory_that_was_given_away() -> None:
    """The tensor that it was given to has memory of its own, and would not see it."""

    def given(x: torch.Tensor) -> torch.Tensor:
        y, z = x**2, torch.ones_like(x)
        y.data = z
        z.mul_(2)
        return y

    with pytest.raises(Torch2JaxError, match=r"x\.data\.copy_"):
        torch2jax(given, lower=True)(1.2)


# --- derivatives taken inside ---------------------------------------------------------------------

OPERATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "softmax": lambda a: a.softmax(0)[0],
    "norm": torch.linalg.norm,
    "layer_norm": lambda a: F.layer_norm(a, (4,))[0],
    "batch_norm": lambda a: F.batch_norm(a.reshape(4, 1), None, None, training=True)[0],
    "instance_norm": lambda a: F.instance_norm(a.reshape(1, 1, 4))[0, 0, 1],
    "rms_norm": lambda a: F.rms_norm(a, (4,))[0],
    "fft": lambda a: torch.fft.fft(a).abs() ** 3,
    "sgn": lambda a: torch.view_as_real(torch.sgn(torch.complex(a, a * a)))[:, 0],
    "attention": lambda a: F.scaled_dot_product_attention(
        a.reshape(1, 2, 2), a.reshape(1, 2, 2), a.reshape(1, 2, 2)
    ),
}


def by_hand(a: torch.Tensor) -> torch.Tensor:
    off = a - a.mean()
    return off / torch.sqrt((off * off).mean() + 1e-5)


# PyTorch's reverse derivative of its forward derivative of these takes their statistics for
# constants, and its attention has no forward derivative. (From 2.14 on it has no second one either.)
RIGHT_BY_JVP: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "layer_norm": lambda a: by_hand(a)[0],
    "batch_norm": lambda a: by_hand(a)[0],
    "instance_norm": lambda a: by_hand(a)[1],
    "attention": lambda a: (a.view(2, 2) @ a.view(2, 2).T / 2**0.5).softmax(-1) @ a.view(2, 2),
}


def by_autograd(op: Any, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Forces, a gradient penalty, a residual of a differential equation."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(op(w * x).sum(), x, create_graph=True)
    return (g * w).sum()


def by_grad(op: Any, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (torch.func.grad(lambda x: op(w * x).sum())(x) * w).sum()


def by_jvp(op: Any, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.func.jvp(lambda x: op(w * x), (x,), (w,))[1].sum()


@pytest.mark.parametrize("way", [by_autograd, by_grad, by_jvp])
@pytest.mark.parametrize("name", OPERATORS)
def test_derivatives_inside(name: str, way: Any) -> None:
    op = OPERATORS[name]
    twin = RIGHT_BY_JVP.get(name, op) if way is by_jvp or name == "attention" else op
    found = by_lower(lambda w, x: way(op, w, x), W, X)
    agree(found, right(lambda w, x: way(twin, w, x), W, X))


def test_forward_mode_over_a_derivative_inside() -> None:
    def fn(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return by_grad(torch.tanh, w, x)

    def twin(w: Any, x: Any) -> Any:
        return (jax.grad(lambda x: jnp.tanh(w * x).sum())(x) * w).sum()

    args = jnp.asarray(W.numpy()), jnp.asarray(X.numpy())
    lowered = torch2jax(fn, lower=True)
    np.testing.assert_allclose(
        jax.jvp(lowered, args, args)[1], jax.jvp(twin, args, args)[1], rtol=1e-5
    )
    np.testing.assert_allclose(
        jax.hessian(lowered)(*args), jax.hessian(twin)(*args), rtol=1e-4, atol=1e-5
    )


def test_the_device_compiles_a_derivative_inside() -> None:
    w = W.clone().to("jax").requires_grad_()
    x = X.to("jax")
    step = device.jit(lambda x: by_autograd(torch.tanh, w, x))
    for _ in range(2):
        w.grad = None
        out = step(x)
        out.backward()
        expected = right(lambda w: by_autograd(torch.tanh, w, X), W)
        agree([out.detach().jax(), w.grad.jax()], expected)


# --- functions with a backward pass of their own --------------------------------------------------


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        n = x.shape[0]
        made = torch.ones(n) * torch.eye(n).sum(0) * torch.tensor([1.0, 2.0, 3.0, 4.0])
        return g * made * x


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return g * 5


def makes_tensors(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (Rounded.apply(3 * w * x) * x).sum()


def writes_to_its_operand(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = w * x
    z = Doubled.apply(y)
    return (y * y).sum() + (z * x).sum()


def inside_of_autograd(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = (Rounded.apply(3 * w * x) * w * x).sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
    return (g * w).sum() + y


@pytest.mark.parametrize("run", [by_lower, by_the_device])
@pytest.mark.parametrize("fn", [makes_tensors, writes_to_its_operand, inside_of_autograd])
def test_autograd_functions(fn: Any, run: Any) -> None:
    agree(run(fn, W, X), right(fn, W, X))


class OnDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return g * 3


def test_the_device_compiles_an_autograd_function() -> None:
    w = W.clone().to("jax").requires_grad_()
    step = device.jit(lambda x: (OnDevice.apply(3 * w * x) * x).sum())
    expected = right(lambda w: (OnDevice.apply(3 * w * X) * X).sum(), W)
    for _ in range(2):
        w.grad = None
        out = step(X.to("jax"))
        out.backward()
        agree([out.detach().jax(), w.grad.jax()], expected)
