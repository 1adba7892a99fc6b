"""Third order: all eight orders of modes along a line, and nested gradients."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import Case
from harness import CORE_THRICE, Function, agree_on_differentiable, every, like, weigh, weighed

MODES = ["".join(modes) for modes in itertools.product("rf", repeat=3)]
# what has most structure to get wrong; every other case in one mode, below
NAMES = ("sin_mul", "solve", "cumprod", "polar", "function_without_jvp", "pytrees")
RICH = [case for case in CORE_THRICE if case.name in NAMES]


def along_a_line(modes: str) -> Function:
    """Third derivative of t -> weighed(f)(xs + t v), one mode each, the innermost first."""

    def transform(f: Function, *xs: Any) -> Any:
        def line(t: jax.Array) -> jax.Array:
            steps = [(t * v).astype(x.dtype) for x, v in zip(xs, like(xs), strict=True)]
            return weigh(f(*[x + step for x, step in zip(xs, steps, strict=True)]))

        for mode in modes:
            line = (jax.jacrev if mode == "r" else jax.jacfwd)(line)
        return line(jnp.zeros(()))

    return transform


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("case", RICH, ids=str)
def test_modes(case: Case, modes: str) -> None:
    agree_on_differentiable(case, along_a_line(modes), x64=True, scale=10)


@pytest.mark.parametrize("case", CORE_THRICE, ids=str)
def test_grad_of_grad_of_grad(case: Case) -> None:
    def third(f: Function, *xs: Any) -> Any:
        first = jax.grad(weighed(f), every(xs))
        second = jax.grad(weighed(first), every(xs))
        return jax.grad(weighed(second), every(xs))(*xs)

    agree_on_differentiable(case, third, x64=True, scale=10)


@pytest.mark.parametrize("case", CORE_THRICE, ids=str)
def test_jvp_of_jvp_of_jvp(case: Case) -> None:
    agree_on_differentiable(case, along_a_line("fff"), x64=True, scale=10)


@pytest.mark.parametrize("case", [case for case in RICH if case.size <= 6], ids=str)
def test_tensor_of_third_derivatives(case: Case) -> None:
    def third(f: Function, *xs: Any) -> Any:
        return jax.jacfwd(jax.hessian(weighed(f)))(*xs)

    agree_on_differentiable(case, third, x64=True, real=True, scale=10)
