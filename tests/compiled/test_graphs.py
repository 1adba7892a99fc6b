"""What compiled=True traces: values, derivatives, batches, on recorded graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import harness
import hugging_face
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded as recording
import torch
from cases import Case
from harness import DIFFERENTIABLE, agree_on_differentiable, every, weighed
from torch import nn
from torch.nn import functional as F

from torch2jax import from_module, torch2jax

pytestmark = pytest.mark.usefixtures("recorded")

REFUSED = ("branch", "loop", "numpy_inside")
"""These cases ask for values: test_refusals has the error."""


@functools.cache
def compiled(case: Case) -> Callable[..., Any]:
    return torch2jax(case.torch_fn, compiled=True)


@pytest.fixture
def through_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the cases of the table with compiled=True."""
    monkeypatch.setattr(harness, "bridge", compiled)


@pytest.mark.usefixtures("through_graphs")
@pytest.mark.parametrize("case", [c for c in DIFFERENTIABLE if c.name not in REFUSED][::3], ids=str)
def test_value_and_grad(case: Case) -> None:
    agree_on_differentiable(case, lambda f, *xs: jax.value_and_grad(weighed(f), every(xs))(*xs))


X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).standard_normal((4, 4)) / 2, jnp.float32)
ROWS = jnp.stack([X, 2 * X, X - 1])


def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.tanh(a @ b) * 2 + F.layer_norm(a, (4,))


def twin(a: Any, b: Any) -> Any:
    centred = a - a.mean(-1, keepdims=True)
    return jnp.tanh(a @ b) * 2 + centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def loss(f: Any) -> Callable[..., Any]:
    return lambda a, b: (f(a, b) ** 2).sum()


COMPOSITIONS: dict[str, Callable[[Any], Any]] = {
    "jvp": lambda f: jax.jvp(f, (X, Y), (X * 0 + 1, Y)),
    "jacfwd": lambda f: jax.jacfwd(f, 1)(X, Y),
    "jacrev": lambda f: jax.jacrev(f, (0, 1))(X, Y),
    "hessian": lambda f: jax.hessian(loss(f))(X, Y),
    "hvp": lambda f: jax.jvp(jax.grad(lambda a: loss(f)(a, Y)), (X,), (X,)),
    "vmap": lambda f: jax.vmap(f, (0, None))(ROWS, Y),
    "vmap_grad": lambda f: jax.vmap(jax.grad(loss(f), (0, 1)), (0, None))(ROWS, Y),
    "vmap_pullback": lambda f: jax.vmap(jax.vjp(f, X, Y)[1])(ROWS),
    "grad_vmap": lambda f: jax.grad(lambda a, b: (jax.vmap(f, (0, None))(a, b) ** 2).sum(), (0, 1))(
        ROWS, Y
    ),
    "vmap_vmap_grad": lambda f: jax.vmap(jax.vmap(jax.grad(loss(f), (0, 1)), (0, None)), (None, 0))(
        ROWS, jnp.stack([Y, 2 * Y])
    ),
    "scan": lambda f: jax.grad(
        lambda a: jax.lax.scan(lambda c, _: (f(c, Y) / 2, c.sum()), a, None, length=3)[1].sum()
    )(X),
    "vmap_grad_scan": lambda f: jax.vmap(
        jax.grad(lambda a: jax.lax.scan(lambda c, _: (f(c, Y) / 2, None), a, None, 2)[0].sum())
    )(ROWS),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(loss(f)))(X, Y),
    "checkpoint_saving_all": lambda f: jax.grad(
        jax.checkpoint(loss(f), policy=jax.checkpoint_policies.everything_saveable)
    )(X, Y),
    "cond": lambda f: jax.grad(
        lambda a: jax.lax.cond(a.sum() > 0, lambda a: f(a, Y), lambda a: f(2 * a, Y), a).sum()
    )(X),
    "linearize": lambda f: jax.linearize(lambda a: f(a, Y), X)[1](X),
    "transposed_twice": lambda f: jax.vjp(lambda c: jax.vjp(lambda a: f(a, Y), X)[1](c)[0], X)[1](
        X
    ),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions(name: str, jit: bool) -> None:
    def run(f: Any) -> Any:
        return COMPOSITIONS[name](f)

    f = torch2jax(fn, compiled=True)
    actual = jax.jit(lambda: run(f))() if jit else run(f)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(run(twin)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_the_backward_pass_takes_residuals() -> None:
    """It does not compute the forward pass again: of two products each graph has one."""
    w = torch.eye(4)
    f = torch2jax(lambda x: torch.sin(x @ w), compiled=True)
    jax.jit(jax.value_and_grad(lambda x: f(x).sum()))(X)
    forward, backward = recording.graphs
    assert [_count(forward, "mm"), _count(backward, "mm")] == [1, 1]
    assert len(forward.results) == 2


def test_recompute_keeps_no_residuals() -> None:
    f = torch2jax(lambda x: torch.exp(x).sin(), compiled=True, residuals="recompute")
    jax.jit(jax.value_and_grad(lambda x: f(x).sum()))(jnp.ones(3))
    assert [len(g.results) for g in recording.graphs] == [1, 1]


def test_dead_residuals_are_not_returned() -> None:
    f = torch2jax(lambda x: torch.exp(x).sin(), compiled=True)
    jax.jit(lambda x: jax.vjp(f, x)[0])(jnp.ones(3))
    assert [len(g.results) for g in recording.graphs] == [1]


def _count(graph: Any, name: str) -> int:
    return sum(f"aten.{name}." in str(node.target) for node in graph.module.graph.nodes)


def test_residuals_of_64_bits_with_x64_off() -> None:
    """The places of a maximum are int64 in PyTorch."""
    f = torch2jax(lambda x: F.max_pool1d(x, 2), compiled=True)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 6)), jnp.float32)
    found = jax.grad(lambda x: (f(x) ** 2).sum())(x)
    pairs = x.reshape(1, 2, 3, 2)
    expected = jnp.where(pairs == pairs.max(-1, keepdims=True), 2 * pairs, 0).reshape(x.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_residuals_with_strides_of_their_own() -> None:
    """A residual is row-major for XLA, whatever its strides were in the forward pass."""

    def attention(x: torch.Tensor) -> torch.Tensor:
        heads = x.reshape(2, 5, 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(2, 5, 8)

    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    f = torch2jax(attention, compiled=True)
    found = jax.grad(lambda x: (f(x) ** 2).sum())(x)
    t = torch.from_numpy(x).requires_grad_()
    (attention(t) ** 2).sum().backward()
    np.testing.assert_allclose(found, t.grad, rtol=1e-4, atol=1e-5)


def test_complex_gradients_are_jaxs() -> None:
    f = torch2jax(lambda z: (z * z.conj() * z).real, compiled=True)
    z = jnp.asarray([1 + 2j, 0.5 - 1j], jnp.complex64)
    found = jax.grad(lambda z: f(z).sum())(z)
    expected = jax.grad(lambda z: jnp.real(z * jnp.conj(z) * z).sum())(z)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_writes_in_place_inside() -> None:
    def busy(x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        y.relu_()
        z = y * 2
        z[0] = z[1] + 1
        z[:, 1].mul_(3)
        return z

    def of_jax(x: Any) -> Any:
        z = jax.nn.relu(x) * 2
        z = z.at[0].set(z[1] + 1)
        return z.at[:, 1].multiply(3)

    f = torch2jax(busy, compiled=True)
    np.testing.assert_allclose(f(X), of_jax(X), rtol=1e-6)
    np.testing.assert_allclose(
        jax.grad(lambda x: (f(x) ** 2).sum())(X), jax.grad(lambda x: (of_jax(x) ** 2).sum())(X)
    )


def test_inplace_argnums() -> None:
    def update(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(y)
        return x.sum()

    f = torch2jax(update, compiled=True, inplace_argnums=0)
    total, updated = jax.jit(f, donate_argnums=0)(X + 0, X)
    np.testing.assert_allclose(updated, 2 * X, rtol=1e-6)
    np.testing.assert_allclose(total, 2 * X.sum(), rtol=1e-4)


def test_closed_over_tensors_are_constants() -> None:
    w, i = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0])
    f = torch2jax(lambda x: (x * w)[i], compiled=True)
    assert jnp.array_equal(f(jnp.ones(3)), jnp.array([3.0, 1.0]))
    assert jnp.array_equal(jax.grad(lambda x: f(x).sum())(jnp.ones(3)), jnp.array([1.0, 0, 3.0]))


def test_trees_statics_and_keywords() -> None:
    def g(batch: Any, power: int, *, scale: Any = 1.0) -> Any:
        return {"a": batch["x"] ** power * scale, "b": [batch["x"].sum()]}

    f = torch2jax(g, compiled=True, static_argnums=1)
    out = f({"x": X}, 2, scale=jnp.float32(3))
    np.testing.assert_allclose(out["a"], 3 * X**2, rtol=1e-6)
    grads = jax.grad(lambda s: f({"x": X}, 3, scale=s)["a"].sum())(jnp.float32(2))
    np.testing.assert_allclose(grads, (X**3).sum(), rtol=1e-4)


def test_modules_with_buffers_in_training() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True))
    apply, variables = from_module(module, compiled=True)
    plain, _ = from_module(module)
    out, buffers = apply(variables, X, train=True)
    expected, moved = plain(variables, X, train=True)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    for name in moved:
        np.testing.assert_allclose(buffers[name], moved[name], rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_hugging_face(name: str) -> None:
    make, inputs, options = hugging_face.MODELS[name]
    hugging_face.agrees(make(**options), inputs, compiled=True)
