"""Calls inside JAX's control flow, and derivatives and batches of that."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import Case
from harness import (
    CORE,
    CORE_FORWARD,
    MAPPED,
    Function,
    agree_on_batch,
    agree_on_differentiable,
    agree_on_leaves,
    every,
    like,
    weigh,
    weighed,
)
from jax import lax

MAPPED_CORE = [case for case in MAPPED if case.core or not case.differentiable]


def shrink(carry: Any, xs: Any) -> list[Any]:
    """The leaves, real and complex ones scaled by the carry."""
    return [(x * carry).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in xs]


def next_carry(out: Any) -> jax.Array:
    """Something in (0.85, 0.95), so that scaled arguments stay where the functions are smooth."""
    return 0.9 + 0.05 * jnp.tanh(0.1 * weigh(out))


def chain(f: Function, steps: int) -> Function:
    """f repeated by fori_loop, each time on arguments scaled by what came out before."""

    def looped(*xs: Any) -> Any:
        body = lambda _, carry: next_carry(f(*shrink(carry, xs)))  # noqa: E731
        return f(*shrink(lax.fori_loop(0, steps, body, jnp.ones(())), xs))

    return looped


@pytest.mark.parametrize("case", MAPPED_CORE, ids=str)
def test_scan(case: Case) -> None:
    def transform(f: Function, *xs: Any) -> Any:
        def body(carry: Any, row: Any) -> Any:
            out = f(*shrink(carry, row))
            return next_carry(out), out

        return lax.scan(body, jnp.ones(()), list(xs))

    agree_on_batch(case, transform, x64=False, scale=3)


@pytest.mark.parametrize("case", CORE, ids=str)
def test_grad_of_scan(case: Case) -> None:
    """The carry couples the steps; arguments are constants of the loop, scaled by it."""

    def transform(f: Function, *xs: Any) -> Any:
        def loss(*xs: Any) -> Any:
            def body(carry: Any, factor: Any) -> Any:
                out = f(*shrink(carry * factor, xs))
                return next_carry(out), weigh(out)

            carry, outs = lax.scan(body, jnp.ones(()), 1 - jnp.arange(3) / 16)
            return carry + outs.sum()

        return jax.grad(loss, every(xs))(*xs)

    agree_on_differentiable(case, transform)


@pytest.mark.parametrize("case", CORE_FORWARD, ids=str)
def test_jvp_of_scan(case: Case) -> None:
    def transform(f: Function, *xs: Any) -> Any:
        def loss(*xs: Any) -> Any:
            body = lambda carry, _: (next_carry(f(*shrink(carry, xs))),) * 2  # noqa: E731
            return lax.scan(body, jnp.ones(()), None, length=3)

        return jax.jvp(loss, xs, like(xs))

    agree_on_differentiable(case, transform)


@pytest.mark.parametrize("case", MAPPED_CORE, ids=str)
def test_while_loop(case: Case) -> None:
    def transform(f: Function, *xs: Any) -> Any:
        def body(state: Any) -> Any:
            i, carry, _ = state
            out = f(*shrink(carry, xs))
            return i + 1, next_carry(out), out

        return lax.while_loop(lambda state: state[0] < 3, body, (0, jnp.ones(()), f(*xs)))

    agree_on_leaves(case, transform, x64=False, scale=3)


@pytest.mark.parametrize("case", MAPPED_CORE, ids=str)
def test_fori_loop(case: Case) -> None:
    agree_on_leaves(case, lambda f, *xs: chain(f, 3)(*xs), x64=True, scale=3)


@pytest.mark.parametrize("case", CORE, ids=str)
def test_grad_of_fori_loop(case: Case) -> None:
    agree_on_differentiable(case, lambda f, *xs: jax.grad(weighed(chain(f, 2)), every(xs))(*xs))


def conditional(f: Function) -> Function:
    """lax.cond between f and, of the same structure, f at half its arguments, or zeros."""

    def choose(which: Any, *xs: Any) -> Any:
        other = lambda *xs: f(*shrink(0.5, xs))  # noqa: E731
        zeros = lambda *xs: jax.tree.map(jnp.zeros_like, f(*xs))  # noqa: E731
        return lax.cond(which > 0, f, other, *xs), lax.switch(which, [zeros, other, f], *xs)

    return choose


@pytest.mark.parametrize("case", MAPPED_CORE, ids=str)
def test_cond_and_switch(case: Case) -> None:
    def transform(f: Function, *xs: Any) -> Any:
        both = jax.jit(conditional(f))
        return [both(jnp.asarray(which), *xs) for which in (0, 1, 2)]

    agree_on_leaves(case, transform, x64=False, jit=False)


@pytest.mark.parametrize("case", CORE, ids=str)
def test_grad_of_cond_and_switch(case: Case) -> None:
    def transform(f: Function, *xs: Any) -> Any:
        grad = jax.jit(
            jax.grad(
                lambda which, *xs: weigh(conditional(f)(which, *xs)), tuple(range(1, 1 + len(xs)))
            )
        )
        return [grad(jnp.asarray(which), *xs) for which in (0, 1)]

    agree_on_differentiable(case, transform, jit=False)


@pytest.mark.parametrize("case", MAPPED_CORE, ids=str)
def test_vmap_of_cond(case: Case) -> None:
    """With a batched predicate both branches run and the results are selected."""

    def transform(f: Function, *xs: Any) -> Any:
        return jax.vmap(conditional(f))(jnp.arange(3), *xs)

    agree_on_batch(case, transform, x64=True)


@pytest.mark.parametrize("case", MAPPED_CORE, ids=str)
def test_vmap_of_scan(case: Case) -> None:
    agree_on_batch(case, lambda f, *xs: jax.vmap(chain(f, 2))(*xs), x64=True)


@pytest.mark.parametrize("case", MAPPED_CORE[::4], ids=str)
def test_map(case: Case) -> None:
    agree_on_batch(case, lambda f, *xs: lax.map(lambda row: f(*row), list(xs)), x64=True)
