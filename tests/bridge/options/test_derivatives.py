"""Options of derivatives: `nondiff_argnums`, `depth` and the older names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from option_functions import X, same

from torch2jax import DifferentiationError, torch2jax, torch2jax_with_vjp, torch2jax_without_vjp


class Traced(torch.autograd.Function):
    """The identity, which notes every pass backward."""

    passes = 0

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        return a.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        Traced.passes += 1
        return g


@pytest.mark.parametrize("depth", [None, 1, 2, 3])
@pytest.mark.parametrize(
    "option",
    [
        {"nondiff_argnums": 1},
        {"nondiff_argnums": (1,)},
        {"nondiff_argnums": -1},
        {"nondiff_mask": (False, True)},
        {"nondiff_mask": [False, True]},
        {"nondiff_mask": (False, {"p": True})},
    ],
    ids=["int", "tuple", "negative", "prefix", "list", "tree"],
)
def test_nondiff(depth: int | None, option: dict[str, Any]) -> None:
    f = torch2jax(lambda a, d: a**2 * Traced.apply(d["p"]), depth=depth, **option)
    Traced.passes = 0
    grads = jax.grad(lambda a, d: f(a, d).sum(), (0, 1))(X, {"p": X})
    same(grads, (2 * X * X, {"p": np.zeros(4)}))
    second = jax.grad(lambda a: jax.grad(lambda a: f(a, {"p": X}).sum())(a).sum())
    if depth != 1:
        same(second(X), 2 * X)
    assert Traced.passes == 0


def test_nondiff_in_forward_mode() -> None:
    f = torch2jax(lambda a, b: a * b, nondiff_argnums=1)
    same(jax.jacfwd(f, (0, 1))(X, X), (np.diag(X), np.zeros((4, 4))))
    same(jax.vmap(jax.grad(lambda a, b: f(a, b), (0, 1)))(X, X), (X, np.zeros(4)))


def test_inputs_without_tangents_cost_nothing() -> None:
    Traced.passes = 0
    f = torch2jax(lambda a, b: a * Traced.apply(b))
    jax.grad(lambda a: f(a, X).sum())(X)
    assert Traced.passes == 0


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_depth(depth: int) -> None:
    f: Any = torch2jax(torch.sin, depth=depth)
    twin: Any = jnp.sin
    x = np.float32(0.3)
    same(f(x), twin(x))
    same(jax.vmap(f)(X), twin(X))
    for _ in range(depth):
        f, twin = jax.grad(f), jax.grad(twin)
        same(f(x), twin(x))
        same(jax.jit(f)(x), twin(x))
        same(jax.vmap(f)(X), jax.vmap(twin)(X))
    with pytest.raises(DifferentiationError, match=rf"depth={depth}\b.*depth={depth + 1}"):
        jax.grad(f)(x)
    with pytest.raises(DifferentiationError):
        jax.jit(jax.grad(f))(x)
    same(f(x), twin(x))


@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize(
    "through",
    [lambda g: g, jax.jit, lambda g: lambda x: jax.vmap(g)(x[None])[0]],
    ids=["eager", "jit", "vmap"],
)
def test_depth_counts_in_both_modes(inner: Any, outer: Any, through: Any) -> None:
    def second(depth: int) -> Any:
        return through(outer(inner(torch2jax(lambda a: torch.sin(a).prod(), depth=depth))))

    same(second(2)(X), outer(inner(lambda a: jnp.sin(a).prod()))(X), 1e-4)
    with pytest.raises(DifferentiationError, match=r"2 times.*depth=1\b.*depth=2"):
        second(1)(X)
    with pytest.raises(DifferentiationError, match=r"3 times.*depth=2\b.*depth=3"):
        jax.grad(lambda x: second(2)(x).sum())(X)


def test_depth_none_has_no_limit() -> None:
    f: Any = torch2jax(lambda a: torch.exp(2 * a))
    for _ in range(5):
        f = jax.grad(f)
    same(f(0.0), 32.0)


def test_depth_one_in_loops_and_checkpoint() -> None:
    f = torch2jax(lambda a: torch.sin(a), depth=1)

    def run(g: Any) -> Any:
        return lambda x: jax.checkpoint(
            lambda x: jax.lax.scan(lambda c, _: (g(c), None), x, None, length=3)[0]
        )(x)

    same(jax.grad(run(f))(0.3), jax.grad(run(jnp.sin))(0.3))


def test_the_older_names() -> None:
    assert torch2jax_without_vjp(torch.sin) is torch2jax(torch.sin, depth=0)
    with pytest.warns(DeprecationWarning, match="torch2jax"):
        assert torch2jax_with_vjp(torch.sin) is torch2jax(torch.sin)


def test_options_of_older_bridges() -> None:
    f = torch2jax(torch.sin, use_torch_vjp=True, use_zeros=False)
    same(jax.grad(lambda a: f(a).sum())(X), np.cos(X))
