"""Batches of derivatives and derivatives of batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from cases import Case
from harness import (
    CORE,
    CORE_FORWARD,
    CORE_TWICE,
    DIFFERENTIABLE,
    Function,
    agree,
    as_real,
    draws,
    every,
    floats,
    like,
    on_differentiable,
    own_precision,
    stack,
    weighed,
)

SEVERAL = [case for case in CORE if sum(spec.diff for spec in case.specs) > 1]


def agree_on_rows(case: Case, transform: Callable[..., Any], *, real: bool = False) -> None:
    """`agree` for a transform of a function of the differentiable leaves, called with a batch of
    each.

    real: complex leaves and results as pairs of real ones.
    """
    x64 = own_precision(case)
    rows = draws(case, 3, x64)

    def split(fn: Function, leaves: list[np.ndarray]) -> tuple[Function, list[np.ndarray]]:
        chosen = on_differentiable(fn, case, rows[0])[0], on_differentiable(fn, case, leaves)[1]
        return as_real(*chosen) if real else chosen

    columns = [split(case.twin, leaves)[1] for leaves in rows]
    batch = stack(columns, (0,) * len(columns[0]))
    agree(case, transform, *batch, on=lambda fn: split(fn, rows[0])[0], x64=x64, scale=3)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_vmap_of_grad(case: Case) -> None:
    agree_on_rows(case, lambda f, *xs: jax.vmap(jax.grad(weighed(f), every(xs)))(*xs))


@pytest.mark.parametrize("case", CORE, ids=str)
def test_grad_of_vmap(case: Case) -> None:
    agree_on_rows(case, lambda f, *xs: jax.grad(weighed(jax.vmap(f)), every(xs))(*xs))


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_grad_of_vmap_with_a_shared_argument(case: Case) -> None:
    """The first leaf is one for all rows: its gradient is the sum of theirs."""

    def transform(f: Function, x: Any, *rest: Any) -> Any:
        mapped = jax.vmap(f, (None, *(0 for _ in rest)))
        return jax.grad(weighed(mapped), every((x, *rest)))(x[0], *rest)

    agree_on_rows(case, transform)


@pytest.mark.parametrize("case", CORE, ids=str)
def test_vmap_of_pullback(case: Case) -> None:
    """Only the cotangents are batched."""

    def transform(f: Function, *xs: Any) -> Any:
        out, pull = jax.vjp(floats(f), *[x[0] for x in xs])
        return jax.vmap(pull)([np.stack([y, -y, y * 0]) for y in like(out)])

    agree_on_rows(case, transform)


@pytest.mark.parametrize("case", CORE_FORWARD, ids=str)
def test_vmap_of_jvp(case: Case) -> None:
    agree_on_rows(case, lambda f, *xs: jax.vmap(lambda *xs: jax.jvp(floats(f), xs, xs))(*xs))


@pytest.mark.parametrize("case", CORE_FORWARD, ids=str)
def test_vmap_of_pushforward(case: Case) -> None:
    """Only the tangents are batched."""

    def transform(f: Function, *xs: Any) -> Any:
        _, push = jax.linearize(floats(f), *[x[0] for x in xs])
        return jax.vmap(push)(*like(xs))

    agree_on_rows(case, transform)


@pytest.mark.parametrize("case", CORE_FORWARD, ids=str)
def test_jvp_of_vmap(case: Case) -> None:
    agree_on_rows(case, lambda f, *xs: jax.jvp(jax.vmap(f), xs, like(xs)))


@pytest.mark.parametrize("case", CORE_FORWARD, ids=str)
def test_jacfwd_of_vmap(case: Case) -> None:
    def transform(f: Function, *xs: Any) -> Any:
        return jax.jacfwd(weighed(jax.vmap(f)), every(xs))(*xs)

    agree_on_rows(case, transform, real=True)


@pytest.mark.parametrize("case", CORE[::2], ids=str)
def test_vmap_of_jacrev(case: Case) -> None:
    agree_on_rows(case, lambda f, *xs: jax.vmap(jax.jacrev(floats(f), every(xs)))(*xs), real=True)


@pytest.mark.parametrize("case", CORE_TWICE, ids=str)
def test_vmap_of_hessian_vector_product(case: Case) -> None:
    def transform(f: Function, *xs: Any) -> Any:
        hvp = lambda *xs: jax.jvp(jax.grad(weighed(f), every(xs)), xs, xs)[1]  # noqa: E731
        return jax.vmap(hvp)(*xs)

    agree_on_rows(case, transform)


@pytest.mark.parametrize("case", CORE_TWICE, ids=str)
def test_grad_of_vmap_of_grad(case: Case) -> None:
    def transform(f: Function, *xs: Any) -> Any:
        return jax.grad(weighed(jax.vmap(jax.grad(weighed(f), every(xs)))), every(xs))(*xs)

    agree_on_rows(case, transform)


@pytest.mark.parametrize("case", CORE_TWICE, ids=str)
def test_vmap_of_vmap_of_grad(case: Case) -> None:
    """Every row of the first leaf with every row of the others."""

    def transform(f: Function, *xs: Any) -> Any:
        grad = jax.grad(weighed(f), every(xs))
        inner = jax.vmap(grad, (0, *(None for _ in xs[1:])))
        outer = inner if len(xs) == 1 else jax.vmap(inner, (None, *(0 for _ in xs[1:])))
        return outer(*xs)

    agree_on_rows(case, transform)
