"""Hooks on gradients under `lower=True` and on the device, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from torch2jax import Torch2JaxError, device, from_module, torch2jax

X = torch.tensor([0.7, -1.4, 0.3, 2.0])


def scaled(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.register_hook(lambda g: g * 10)
    return (y * y).sum() + x.sum()


def clipped_where_it_is_used_twice(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.register_hook(lambda g: g.clamp(-1, 1))
    return (y * y).sum() + y.sin().sum()


def several_and_one_removed(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    y.register_hook(lambda g: g + 1)
    handle = y.register_hook(lambda g: g * 100)
    y.register_hook(lambda g: g * torch.ones(4, device=g.device) * 3)
    handle.remove()
    return (y * x).sum()


def that_only_looks(x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    y.register_hook(lambda g: None)
    return (y * x).sum()


def of_a_view(x: torch.Tensor) -> torch.Tensor:
    y = (x * 3).view(2, 2)
    y.register_hook(lambda g: g.cos())
    return (y.t() @ y).sum()


def of_a_part(x: torch.Tensor) -> torch.Tensor:
    y, z = (x * 3).chunk(2)
    y.register_hook(lambda g: g.cos())
    return (y * z).sum() + (z * z).sum()


def of_complex_values(x: torch.Tensor) -> torch.Tensor:
    y = torch.complex(x, x * x)
    y.register_hook(lambda g: g * (1 + 2j))
    return (y * y * (2 - 1j)).real.sum()


HOOKED = [
    scaled, clipped_where_it_is_used_twice, several_and_one_removed, that_only_looks, of_a_view,
    of_a_part, of_complex_values,
]  # fmt: skip


def right(fn: Callable[..., Any], x: torch.Tensor) -> tuple[Any, Any]:
    leaf = x.clone().requires_grad_()
    out = fn(leaf)
    return out.detach().numpy(), torch.autograd.grad(out, leaf)[0].numpy()


def agree(found: Any, expected: Any) -> None:
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("fn", HOOKED)
def test_hooks_of_tensors(fn: Any) -> None:
    lowered = torch2jax(fn, lower=True)
    x = jnp.asarray(X.numpy())
    agree(jax.value_and_grad(lowered)(x), right(fn, X))
    agree(jax.jit(jax.value_and_grad(lowered))(x), right(fn, X))
    value, g = device.value_and_grad(fn)(device.tensor(x))
    agree((value.jax(), g.jax()), right(fn, X))


@pytest.mark.parametrize("fn", HOOKED)
def test_each_row_has_its_own(fn: Any) -> None:
    rows = torch.stack([X, X.flip(0)])
    found = jax.vmap(jax.grad(torch2jax(fn, lower=True)))(jnp.asarray(rows.numpy()))
    agree(found, [right(fn, x)[1] for x in rows])


@pytest.mark.parametrize("fn", HOOKED)
def test_the_device_compiles_hooks(fn: Any) -> None:
    compiled = device.jit(fn)
    for _ in range(2):
        x = X.clone().to("jax").requires_grad_()
        out = compiled(x)
        out.backward()
        agree((out.detach().jax(), x.grad.jax()), right(fn, X))


def test_hooks_beside_a_gradient_taken_inside() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            y = (x * 1).requires_grad_()
            z = torch.tanh(y)
            z.register_hook(lambda g: g * 3)
            (g,) = torch.autograd.grad(z.sum(), y, create_graph=True)
        return (g * x).sum()

    agree(jax.value_and_grad(torch2jax(fn, lower=True))(jnp.asarray(X.numpy())), right(fn, X))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def full(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return (grad_input[0] * grad_output[0].sum() + 1,)


def pre(module: nn.Module, grad_output: Any) -> Any:
    return (grad_output[0].clamp(-0.1, 0.1),)


def hooked(which: str) -> nn.Module:
    return add_hooks(network(), which)


def add_hooks(net: Any, which: str) -> nn.Module:
    if which in ("full", "both"):
        net[1].register_full_backward_hook(full)
        net[2].register_full_backward_hook(full)
    if which in ("pre", "both"):
        net[1].register_full_backward_pre_hook(pre)
    if which == "parameter":
        net[0].weight.register_hook(lambda g: g * 7)
    return net


KINDS = ["full", "pre", "both", "parameter"]


def gradients(net: nn.Module) -> dict[str, Any]:
    net.zero_grad()
    (net(X[None]) ** 2).sum().backward()
    return {name: p.grad.clone().numpy() for name, p in net.named_parameters()}  # type: ignore[union-attr]


@pytest.mark.parametrize("which", KINDS)
def test_hooks_of_modules(which: str) -> None:
    net = hooked(which)
    expected = gradients(net)
    assert any(not np.allclose(g, expected[name]) for name, g in gradients(network()).items()), (
        "the hooks change nothing"
    )
    apply, variables = from_module(net, lower=True)

    def loss(v: Any) -> Any:
        return (apply(v, jnp.asarray(X[None].numpy())) ** 2).sum()

    for found in (jax.grad(loss)(variables), jax.jit(jax.grad(loss))(variables)):
        for name, g in expected.items():
            np.testing.assert_allclose(found["params"][name], g, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("which", KINDS)
def test_the_device_compiles_hooks_of_modules(which: str) -> None:
    expected = gradients(hooked(which))
    net = add_hooks(network().to("jax"), which)
    compiled = device.jit(net)
    for _ in range(2):
        net.zero_grad()
        (compiled(X[None].to("jax")) ** 2).sum().backward()
        for name, p in net.named_parameters():
            np.testing.assert_allclose(p.grad.jax(), expected[name], rtol=2e-5, atol=2e-6)  # type: ignore[union-attr]


def test_a_full_hook_in_rows() -> None:
    net = hooked("both")
    lowered = torch2jax(lambda x: net(x).sum(), lower=True)
    rows = torch.stack([X, X.flip(0)])
    x = jnp.asarray(rows.numpy())
    expected = [right(lambda x: net(x).sum(), row)[1] for row in rows]
    agree(jax.vmap(jax.grad(lowered))(x), expected)
    # The other way round each identity is batched by itself.
    with pytest.raises(Torch2JaxError, match="register_full_backward_pre_hook"):
        jax.grad(lambda x: jax.vmap(lowered)(x).sum())(x)


def test_what_accumulates_nothing_says_so() -> None:
    def kept(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.retain_grad()
        return y.sum()

    def after(x: torch.Tensor) -> torch.Tensor:
        x.register_post_accumulate_grad_hook(lambda p: None)
        return x.sum()

    for fn in (kept, after):
        with pytest.raises(Torch2JaxError, match=r"jax\.grad"):
            torch2jax(fn, lower=True)(jnp.ones(3))
    net: Any = network()
    net[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    apply, variables = from_module(net, lower=True)
    with pytest.raises(Torch2JaxError, match=r"jax\.grad"):
        apply(variables, jnp.ones((1, 4)))


def test_a_hook_that_returns_another_shape_says_so() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.register_hook(lambda g: g[:1])
        return y.sum()

    with pytest.raises(Torch2JaxError, match=r"shape \(3,\)"):
        jax.grad(torch2jax(fn, lower=True))(jnp.ones(3))


def test_nothing_is_left_behind() -> None:
    import torch.nn.modules.module as modules
    import torch.nn.modules.transformer as transformers

    theirs = modules.BackwardHook, transformers._detect_is_causal_mask
    jax.grad(torch2jax(scaled, lower=True))(jnp.ones(4))
    assert (modules.BackwardHook, transformers._detect_is_causal_mask) == theirs
    assert theirs[0].__module__ == "torch.utils.hooks"
