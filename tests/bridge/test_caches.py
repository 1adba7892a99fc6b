"""Caches outside of modules: a trace leaves nothing in them, and nobody needs output_shapes= for them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from torch2jax import TorchCallError, from_module, torch2jax

X = np.arange(4, dtype=np.float32)


def made(n: int) -> torch.Tensor:
    return torch.arange(n).float()


@functools.lru_cache(maxsize=8)
def lru(n: int) -> torch.Tensor:
    return made(n)


@functools.cache
def unbounded(n: int) -> torch.Tensor:
    return made(n)


@functools.lru_cache
def pair(n: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return made(n), [made(n)]


class Grid:
    def __init__(self, n: int) -> None:
        self.table = made(n)


@functools.lru_cache
def grid(n: int) -> Grid:
    return Grid(n)


TABLES: dict[Any, Any] = {}
LISTS: dict[Any, Any] = {}
TABLE: torch.Tensor | None = None


def in_dict(n: int) -> torch.Tensor:
    if n not in TABLES:
        TABLES[n] = made(n)
    return TABLES[n]


def in_pair(n: int) -> torch.Tensor:
    if n not in LISTS:
        LISTS[n] = (made(n), n)
    return LISTS[n][0]


def in_global(n: int) -> torch.Tensor:
    global TABLE
    if TABLE is None:
        TABLE = made(n)
    return TABLE


class Holder:
    shared: torch.Tensor | None = None

    def __init__(self) -> None:
        self.none: torch.Tensor | None = None


HOLDER = Holder()


def in_attribute(n: int) -> torch.Tensor:
    if HOLDER.none is None:
        HOLDER.none = made(n)
    return HOLDER.none


def in_new_attribute(n: int) -> torch.Tensor:
    if not hasattr(HOLDER, "late"):
        HOLDER.late = made(n)  # type: ignore[attr-defined]
    return HOLDER.late  # type: ignore[attr-defined]


def in_class(n: int) -> torch.Tensor:
    if Holder.shared is None:
        Holder.shared = made(n)
    return Holder.shared


KINDS: dict[str, Any] = {
    "lru_cache": lru,
    "cache": unbounded,
    "tuple": lambda n: pair(n)[0] * pair(n)[1][0] / made(n).clamp(1),
    "object": lambda n: grid(n).table,
    "dict": in_dict,
    "pair": in_pair,
    "global": in_global,
    "attribute": in_attribute,
    "new attribute": in_new_attribute,
    "class": in_class,
}


@pytest.fixture(autouse=True)
def emptied() -> Iterator[None]:
    yield
    empty()


def empty() -> None:
    for cached in (lru, unbounded, pair, grid):
        cached.cache_clear()
    TABLES.clear()
    LISTS.clear()
    sys.modules[__name__].TABLE = None  # type: ignore[attr-defined]
    Holder.shared = HOLDER.none = None
    vars(HOLDER).pop("late", None)


class Uses(nn.Module):
    """Its forward calls what no closure of it names, as DETR's and DINOv3's do."""

    def __init__(self, kind: str, fails: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.kind, self.fails = kind, fails

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = KINDS[self.kind](x.shape[0])
        if self.fails:
            raise ValueError("too late")
        return x * table * self.scale


@pytest.mark.parametrize("lower", [False, True], ids=["bridge", "lower"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_holds_real_tensors_or_none(kind: str, lower: bool) -> None:
    """Eager, compiled, differentiated, of a function and of a module; then plain PyTorch."""
    module = Uses(kind)
    f = torch2jax(lambda a: a * KINDS[kind](a.shape[0]), lower=lower)
    np.testing.assert_allclose(jax.jit(f)(X), X * X)
    assert type(KINDS[kind](4)) is torch.Tensor
    empty()
    np.testing.assert_allclose(f(X), X * X)
    np.testing.assert_allclose(jax.grad(lambda a: f(a).sum())(X), X)
    empty()
    apply, variables = from_module(module, lower=lower)
    grads = jax.grad(lambda p: apply({**variables, "params": p}, X).sum())(variables["params"])
    np.testing.assert_allclose(grads["scale"], (X * X).sum())
    np.testing.assert_allclose(apply(variables, X), 2 * X * X)
    assert type(KINDS[kind](4)) is torch.Tensor
    np.testing.assert_allclose(module(torch.from_numpy(X)).detach(), 2 * X * X)
    np.testing.assert_allclose(KINDS[kind](4), X)


@pytest.mark.parametrize("lower", [False, True], ids=["bridge", "lower"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_that_fails_leaves_nothing(kind: str, lower: bool) -> None:
    apply, variables = from_module(Uses(kind, fails=True), lower=lower)
    with pytest.raises(TorchCallError if not lower else ValueError, match="too late"):
        jax.jit(apply)(variables, X)
    assert type(KINDS[kind](4)) is torch.Tensor
    np.testing.assert_allclose(KINDS[kind](4), X)


def test_a_cache_that_is_full_is_used() -> None:
    want = lru(4)
    f = torch2jax(lambda a: a * lru(a.shape[0]))
    np.testing.assert_allclose(f(X), X * X)
    assert lru(4) is want


def test_what_a_run_on_values_caches_is_taken_out_too() -> None:
    def fn(a: torch.Tensor) -> torch.Tensor:
        a.numpy()
        if "scale" not in TABLES:
            TABLES["scale"] = a * 2
        return a * TABLES["scale"]

    torch2jax(fn).lower(X)
    assert not TABLES


def test_the_users_own_tensors_stay() -> None:
    """A run on values returns tensors that were there before from operators that write to them."""
    TABLES["count"] = count = torch.zeros(())

    def fn(a: torch.Tensor) -> torch.Tensor:
        a.numpy()
        TABLES["count"] = count.add_(1)
        return a * 2

    torch2jax(fn).lower(X)
    assert TABLES["count"] is count
    assert count == 0


def test_a_kept_argument_is_an_error_that_names_clone() -> None:
    kept: list[torch.Tensor] = []

    def fn(a: torch.Tensor) -> torch.Tensor:
        kept.append(a.detach())
        return a * 2

    f = torch2jax(fn)
    f.lower(X)
    assert kept == []
    with pytest.raises(TorchCallError, match=r"views args\[0\].*clone\(\)"):
        f(X)


def test_a_tensor_kept_at_every_call() -> None:
    kept: list[torch.Tensor] = []

    def fn(a: torch.Tensor) -> torch.Tensor:
        kept.append(a * 3)
        return a * 2

    f = torch2jax(fn)
    for _ in range(2):
        f(jnp.asarray(X)).block_until_ready()
    assert [type(t) for t in kept] == [torch.Tensor] * 2
    np.testing.assert_allclose(kept[1], 3 * X)


def test_state_beside_a_tensor_is_as_before() -> None:
    """What says that a table is there is put back with the table."""

    class Lazy:
        ready = False
        table: torch.Tensor | None = None

        def __call__(self, a: torch.Tensor) -> torch.Tensor:
            if not self.ready:
                self.table, self.ready = made(a.shape[0]), True
            assert self.table is not None
            return a * self.table

    lazy = Lazy()
    f = torch2jax(lazy.__call__)
    f.lower(X)
    assert not lazy.ready
    np.testing.assert_allclose(f(X), X * X)


def test_a_variable_of_a_closure_is_as_before() -> None:
    table: torch.Tensor | None = None

    def fn(a: torch.Tensor) -> torch.Tensor:
        nonlocal table
        if table is None:
            table = made(a.shape[0])
        return a * table

    f = torch2jax(fn)
    f.lower(X)
    assert table is None
    np.testing.assert_allclose(f(X), X * X)
    assert type(table) is torch.Tensor
