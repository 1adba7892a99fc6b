"""The user's own jax.custom_vjp and jax.custom_jvp around the call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import Case
from harness import (
    CORE,
    CORE_FORWARD,
    CORE_TWICE,
    Function,
    agree_on_differentiable,
    every,
    like,
    weighed,
)


def doubled_vjp(f: Function) -> Function:
    """f with gradients twice as large, by jax.custom_vjp."""
    wrapped = jax.custom_vjp(f)

    def backward(pull: Any, cotangents: Any) -> Any:
        return tuple(2 * gradient for gradient in pull(cotangents))

    wrapped.defvjp(lambda *xs: jax.vjp(f, *xs), backward)
    return wrapped


def doubled_jvp(f: Function) -> Function:
    """The same by jax.custom_jvp, of a real function."""
    wrapped = jax.custom_jvp(f)

    @wrapped.defjvp
    def forward(primals: Any, tangents: Any) -> Any:
        out, tangent = jax.jvp(f, primals, tangents)
        return out, 2 * tangent

    return wrapped


@pytest.mark.parametrize("case", CORE, ids=str)
def test_custom_vjp(case: Case) -> None:
    agree_on_differentiable(case, lambda f, *xs: jax.grad(weighed(doubled_vjp(f)), every(xs))(*xs))


@pytest.mark.parametrize("case", CORE_TWICE, ids=str)
def test_grad_of_grad_of_custom_vjp(case: Case) -> None:
    def transform(f: Function, *xs: Any) -> Any:
        return jax.grad(weighed(jax.grad(weighed(doubled_vjp(f)), every(xs))), every(xs))(*xs)

    agree_on_differentiable(case, transform, x64=True)


@pytest.mark.parametrize("case", CORE, ids=str)
def test_vmap_of_grad_of_custom_vjp(case: Case) -> None:
    def transform(f: Function, *xs: Any) -> Any:
        rows = [jnp.stack([x, (0.9 * x).astype(x.dtype)]) for x in xs]
        return jax.vmap(jax.grad(weighed(doubled_vjp(f)), every(xs)))(*rows)

    agree_on_differentiable(case, transform)


@pytest.mark.parametrize("case", CORE_FORWARD, ids=str)
def test_custom_jvp(case: Case) -> None:
    agree_on_differentiable(case, lambda f, *xs: jax.jvp(doubled_jvp(weighed(f)), xs, like(xs)))


@pytest.mark.parametrize("case", CORE_FORWARD, ids=str)
def test_grad_of_custom_jvp(case: Case) -> None:
    agree_on_differentiable(case, lambda f, *xs: jax.grad(doubled_jvp(weighed(f)), every(xs))(*xs))


@pytest.mark.parametrize("case", CORE[::2], ids=str)
def test_inside_the_rules(case: Case) -> None:
    """The call stands in a custom_vjp's backward pass, not in its forward pass."""

    def transform(f: Function, *xs: Any) -> Any:
        loss = weighed(f)

        @jax.custom_vjp
        def surrogate(*xs: Any) -> jax.Array:
            return jnp.zeros(())

        surrogate.defvjp(
            lambda *xs: (jnp.zeros(()), xs),
            lambda xs, ct: tuple((ct * g).astype(g.dtype) for g in jax.grad(loss, every(xs))(*xs)),
        )
        return jax.grad(surrogate, every(xs))(*xs)

    agree_on_differentiable(case, transform)
