"""`inplace_argnums`: arguments that the function updates."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from option_functions import Counted, X, same

from torch2jax import Size, Torch2JaxWarning, torch2jax


def update(cache: dict[str, torch.Tensor], i: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    mask = (torch.arange(cache["k"].shape[0]) == i)[:, None]
    cache["k"].copy_(torch.where(mask, row, cache["k"]))
    cache["v"].mul_(2)
    return (cache["k"] * cache["v"]).sum(0)


def updated(cache: Any, i: Any, row: Any) -> Any:
    k = jnp.where((jnp.arange(cache["k"].shape[0]) == i)[:, None], row, cache["k"])
    v = cache["v"] * 2
    return (k * v).sum(0), {"k": k, "v": v}


def fresh() -> dict[str, jax.Array]:
    return {"k": jnp.arange(12.0).reshape(3, 4), "v": jnp.ones((3, 4)) + 1}


def test_a_donated_cache_is_updated_where_it_is() -> None:
    step = jax.jit(torch2jax(update, inplace_argnums=0), donate_argnums=0)
    cache, expected = jax.block_until_ready(fresh()), fresh()
    places = jax.tree.map(lambda x: x.unsafe_buffer_pointer(), cache)
    for i in range(3):
        donated = cache
        out, cache = step(cache, jnp.int32(i), X * i)
        want, expected = updated(expected, i, X * i)
        same((out, cache), (want, expected))
        assert jax.tree.map(lambda x: x.unsafe_buffer_pointer(), cache) == places
        assert donated["k"].is_deleted()


def test_a_cache_that_is_not_donated_is_unchanged() -> None:
    f = torch2jax(update, inplace_argnums=0)
    cache = fresh()
    for run in (f, jax.jit(f)):
        same(run(cache, jnp.int32(1), X), updated(cache, 1, X))
        same(cache, fresh())


def losses(g: Any) -> Any:
    def loss(cache: Any, row: Any) -> Any:
        out, new = g(cache, jnp.int32(1), row)
        return (out**2).sum() + (new["k"] ** 3).sum() + (new["v"] * row).sum()

    return loss


@pytest.mark.parametrize("depth", [None, 2])
def test_derivatives_of_an_update(depth: int | None) -> None:
    f, twin = losses(torch2jax(update, inplace_argnums=0, depth=depth)), losses(updated)
    same(jax.grad(f, (0, 1))(fresh(), X), jax.grad(twin, (0, 1))(fresh(), X))
    hessian = lambda g: jax.jacrev(jax.grad(lambda row: g(fresh(), row)))(X)  # noqa: E731
    same(hessian(f), hessian(twin), 1e-4)
    same(jax.jvp(f, (fresh(), X), (fresh(), X)), jax.jvp(twin, (fresh(), X), (fresh(), X)))


def test_batches_of_an_update() -> None:
    f = torch2jax(update, inplace_argnums=0)
    rows = np.stack([X, 2 * X])
    caches = jax.tree.map(lambda x: jnp.stack([x, x + 1]), fresh())
    args = (caches, jnp.int32(1), rows)
    for run in (jax.vmap, lambda g, axes: jax.jit(jax.vmap(g, axes))):
        same(run(f, (0, None, 0))(*args), run(updated, (0, None, 0))(*args))
    grad = lambda g: jax.vmap(jax.grad(losses(g)))(caches, rows)  # noqa: E731
    same(grad(f), grad(updated))


def test_batches_of_an_update_of_one_cache() -> None:
    """Rows of an argument, one cache: torch refuses to write them into it, so this may loop."""
    f = torch2jax(update, inplace_argnums=0)
    args = (fresh(), jnp.int32(1), np.stack([X, 2 * X]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Torch2JaxWarning)
        same(jax.vmap(f, (None, None, 0))(*args), jax.vmap(updated, (None, None, 0))(*args))
        grad = lambda g: jax.vmap(jax.grad(losses(g)), (None, 0))(fresh(), args[2])  # noqa: E731
        same(grad(f), grad(updated))


def test_an_update_in_scan() -> None:
    f = torch2jax(update, inplace_argnums=0)

    def run(g: Any) -> Any:
        return lambda cache: jax.lax.scan(
            lambda c, i: g(c, i, X)[::-1], cache, jnp.arange(3, dtype=jnp.int32)
        )

    same(jax.jit(run(f))(fresh()), run(updated)(fresh()))


def test_an_update_that_returns_none() -> None:
    def fn(a: torch.Tensor, b: torch.Tensor) -> None:
        a += b
        b *= 2

    x = jnp.asarray(X)
    same(torch2jax(lambda a, b: fn(a, b.clone()), inplace_argnums=0)(x, x), 2 * X)
    same(torch2jax(lambda a, b: fn(a, b.clone()), inplace_argnums=(0,))(x, x), (2 * X,))
    same(torch2jax(fn, inplace_argnums=(0, 1))(x, x + 1), (2 * X + 1, 2 * X + 2))
    same(x, X)


def test_one_array_for_two_updated_arguments() -> None:
    def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a += 1
        b += 10
        return a + b

    f = torch2jax(fn, inplace_argnums=(0, 1))
    x = jnp.asarray(X)
    for run in (f, jax.jit(f)):
        same(run(x, x), (2 * X + 11, (X + 1, X + 10)))
    same(jax.jit(lambda a: f(a, a))(x), (2 * X + 11, (X + 1, X + 10)))
    same(x, X)


@pytest.mark.parametrize("result", ["same", "view", "flipped", "other"])
def test_an_update_that_returns_what_it_updates(result: str) -> None:
    def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a += 1
        return {"same": a, "view": a.view(2, 2).T, "flipped": a.flip(0), "other": b}[result]

    want = {"same": X + 1, "view": (X + 1).reshape(2, 2).T, "flipped": X[::-1] + 1, "other": X}[
        result
    ]
    f = torch2jax(fn, inplace_argnums=0)
    x = jnp.asarray(X)
    same(f(x, x), (want, X + 1))
    same(jax.jit(f, donate_argnums=0)(jnp.asarray(X) + 0, x), (want, X + 1))


def test_updates_of_an_argument_that_fn_gets_in_another_dtype() -> None:
    """An int64 example widens the operand, which makes a copy: the update must come back all the same."""

    def fn(a: torch.Tensor) -> None:
        assert a.dtype is torch.int64
        a += 1

    for f in (
        torch2jax(fn, torch.arange(3), inplace_argnums=0),
        torch2jax(fn, arg_dtypes=(torch.int64,), inplace_argnums=0),
    ):
        same(f(jnp.arange(3)), np.arange(3) + 1)
        same(jax.jit(f)(jnp.arange(3)), np.arange(3) + 1)
        same(jax.vmap(f)(jnp.ones((2, 3), jnp.int32)), np.full((2, 3), 2))


def test_an_update_by_output_shapes() -> None:
    fn = Counted(lambda a: a.add_(1).sum())
    f = torch2jax(fn, inplace_argnums=0, output_shapes=Size([]))
    same(f(jnp.asarray(X)), (X.sum() + 4, X + 1))
    assert fn.calls == 1
