"""jax.checkpoint around the call, with derivatives of both modes."""

from __future__ import annotations

from typing import Any

import jax
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

POLICIES = {
    "none": None,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
}
# JAX itself cannot save complex residuals: reduce_precision does not take them
SAVED = [case for case in CORE[::4] if not case.is_complex and case.name != "polar"]


@pytest.mark.parametrize("case", CORE, ids=str)
def test_grad(case: Case) -> None:
    agree_on_differentiable(
        case, lambda f, *xs: jax.grad(jax.checkpoint(weighed(f)), every(xs))(*xs)
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", SAVED, ids=str)
def test_policies(case: Case, policy: str) -> None:
    def transform(f: Function, *xs: Any) -> Any:
        return jax.value_and_grad(jax.checkpoint(weighed(f), policy=POLICIES[policy]), every(xs))(
            *xs
        )

    agree_on_differentiable(case, transform)


@pytest.mark.parametrize("case", CORE[1::4], ids=str)
def test_eager_grad(case: Case) -> None:
    transform = lambda f, *xs: jax.grad(jax.checkpoint(weighed(f)), every(xs))(*xs)  # noqa: E731
    agree_on_differentiable(case, transform, jit=False)


@pytest.mark.parametrize("case", CORE_FORWARD, ids=str)
def test_jvp(case: Case) -> None:
    agree_on_differentiable(case, lambda f, *xs: jax.jvp(jax.checkpoint(f), xs, like(xs)))


@pytest.mark.parametrize("case", CORE_TWICE, ids=str)
def test_jvp_of_grad(case: Case) -> None:
    def transform(f: Function, *xs: Any) -> Any:
        return jax.jvp(jax.grad(jax.checkpoint(weighed(f)), every(xs)), xs, like(xs))

    agree_on_differentiable(case, transform)


@pytest.mark.parametrize("case", CORE, ids=str)
def test_grad_of_scan(case: Case) -> None:
    """As models are trained: a scan over a checkpointed body."""

    def transform(f: Function, *xs: Any) -> Any:
        @jax.checkpoint
        def body(total: Any, factor: Any) -> Any:
            return total + weighed(f)(*[(x * factor).astype(x.dtype) for x in xs_now]), None

        def loss(*xs: Any) -> Any:
            nonlocal xs_now
            xs_now = xs
            return jax.lax.scan(body, jax.numpy.zeros(()), 1 - jax.numpy.arange(2) / 16)[0]

        xs_now: Any = xs
        return jax.grad(loss, every(xs))(*xs)

    agree_on_differentiable(case, transform)
