"""`vmap_method`: how a batch reaches the function."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from option_functions import Counted, X, same, sds

from torch2jax import Size, Torch2JaxError, Torch2JaxWarning, torch2jax

OWN = ("expand_dims", "broadcast_all", "legacy_vectorized")


@pytest.mark.parametrize("method", ["sequential", *OWN])
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (1, 0)])
def test_methods_mean_what_they_mean_in_pure_callback(
    method: str, axes: tuple[int | None, ...]
) -> None:
    """The function sees the shapes that a callback sees and gives the same result."""
    seen: dict[str, set[Any]] = {"ours": set(), "theirs": set()}

    def torch_fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen["ours"].add((tuple(a.shape), tuple(b.shape)))
        return a * 2 + b

    def callback(a: Any, b: Any) -> Any:
        seen["theirs"].add((a.shape, b.shape))
        return np.asarray(a * 2 + b, np.float32)

    f = torch2jax(torch_fn, output_shapes=Size([3]), vmap_method=method)
    g = lambda a, b: jax.pure_callback(callback, sds(3), a, b, vmap_method=method)  # noqa: E731
    rng = np.random.default_rng(0)
    args = [
        rng.normal(size=(3,) if d is None else (5, 3) if d == 0 else (3, 5)).astype(np.float32)
        for d in axes
    ]
    same(jax.vmap(f, axes)(*args), jax.vmap(g, axes)(*args))
    assert seen["ours"] == seen["theirs"]
    seen["ours"].clear()
    seen["theirs"].clear()
    nested = tuple(None if d is None else 0 for d in axes)
    args = [np.stack([a, a + 1]) if d is not None else a for a, d in zip(args, axes, strict=True)]
    twice = lambda h: jax.vmap(jax.vmap(h, axes), nested)  # noqa: E731
    same(twice(f)(*args), twice(g)(*args))
    assert seen["ours"] == seen["theirs"]


@pytest.mark.parametrize("method", ["auto", "torch", "sequential", "sequential_unrolled", *OWN])
def test_every_method_with_derivatives(method: str) -> None:
    f = torch2jax(lambda a, b: torch.sin(a) * b, vmap_method=method)
    twin = lambda a, b: jnp.sin(a) * b  # noqa: E731
    a, b = np.stack([X, 2 * X, 3 * X]), X
    same(jax.vmap(f, (0, None))(a, b), jax.vmap(twin, (0, None))(a, b))
    grad = lambda g: jax.vmap(jax.grad(lambda a, b: g(a, b).sum(), (0, 1)), (0, None))(a, b)  # noqa: E731
    same(grad(f), grad(twin))
    jac = lambda g: (jax.jacfwd(g, 1)(X, b), jax.jacrev(g, 0)(X, b))  # noqa: E731
    same(jac(f), jac(twin))
    outer = lambda g: jax.grad(lambda a, b: jax.vmap(g, (0, None))(a, b).sum(), (0, 1))(a, b)  # noqa: E731
    same(outer(f), outer(twin))


def test_auto_is_one_call() -> None:
    fn = Counted(lambda a: torch.sin(a))
    f = torch2jax(fn)
    rows = np.ones((6, 4), np.float32)
    run = jax.jit(jax.vmap(f))
    jax.block_until_ready(run(rows))
    before = fn.calls
    jax.block_until_ready(run(rows))
    assert fn.calls == before + 1


def test_auto_warns_once_and_loops() -> None:
    def refuses(a: torch.Tensor) -> torch.Tensor:
        if (a.sum() > 0).item():
            return torch.sin(a)
        return torch.cos(a)

    f = torch2jax(refuses, output_shapes=Size([4]))
    rows = np.stack([X, -X])
    with pytest.warns(Torch2JaxWarning, match="refuses.*(item|_local_scalar_dense)") as caught:
        out = jax.vmap(f)(rows)
    assert len(caught) == 1
    same(out, np.stack([np.sin(X), np.cos(-X)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.vmap(f)(np.stack([X, X, X]))
        same(jax.vmap(jax.grad(lambda a: f(a).sum()))(rows), np.stack([np.cos(X), -np.sin(-X)]))
        same(jax.jit(jax.vmap(jax.vmap(f)))(rows[None]), np.stack([np.sin(X), np.cos(-X)])[None])


def test_auto_does_not_depend_on_warning_filters() -> None:
    """torch warns of a slow batching rule; a user's filter must not choose between one call and a loop."""

    def slow(a: torch.Tensor, i: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return a.index_copy(0, i, row)

    f = torch2jax(slow, arg_dtypes={"i": torch.int64})
    a, i, rows = np.ones((3, 4), np.float32), np.array([1]), np.stack([X[None], 2 * X[None]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", Torch2JaxWarning)  # no loop
        warnings.simplefilter("error", UserWarning)
        out = jax.vmap(f, (None, None, 0))(a, i, rows)
    same(out, jax.vmap(lambda r: jnp.asarray(a).at[1].set(r[0]))(rows))


def test_torch_is_an_error_where_torch_cannot_batch() -> None:
    def refuses(a: torch.Tensor) -> torch.Tensor:
        return a * a.sum().item()

    f = torch2jax(refuses, vmap_method="torch")
    with pytest.raises(Torch2JaxError, match=r"refuses.*sequential"):
        jax.vmap(f)(np.stack([X, X]))
    same(f(X), X * X.sum())


@pytest.mark.parametrize("method", ["sequential", "sequential_unrolled"])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_sequential_calls_once_for_each_row(method: str, n: int) -> None:
    fn = Counted(lambda a: a * 2)
    f = torch2jax(fn, vmap_method=method, output_shapes=Size([4]))
    rows = np.ones((n, 4), np.float32)
    same(jax.vmap(f)(rows), rows * 2)
    assert fn.calls == n


def test_batches_of_nothing() -> None:
    f = torch2jax(lambda a: torch.sin(a))
    assert jax.vmap(f)(np.ones((0, 4), np.float32)).shape == (0, 4)
    assert jax.vmap(jax.grad(lambda a: f(a).sum()))(np.ones((0, 4), np.float32)).shape == (0, 4)
