"""Reverse mode, first order: grad, value_and_grad, vjp."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from compiling import quick_jit
from harness import (
    CORE,
    DIFFERENTIABLE,
    Function,
    agree_on_differentiable,
    bridge,
    check,
    coarseness,
    every,
    floats,
    like,
    looping_allowed,
    own_precision,
    precision,
    weigh,
    weighed,
)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_grad(case: Case, x64: bool) -> None:
    agree_on_differentiable(case, lambda f, *xs: jax.grad(weighed(f), every(xs))(*xs), x64=x64)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_eager_value_and_grad(case: Case) -> None:
    agree_on_differentiable(
        case, lambda f, *xs: jax.value_and_grad(weighed(f), every(xs))(*xs), jit=False
    )


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_vjp(case: Case) -> None:
    """With integer outputs among the results: their cotangents are float0."""

    def vjp(f: Function, *xs: Any) -> Any:
        out, pull = jax.vjp(f, *xs)
        return out, pull(like(out))

    agree_on_differentiable(case, vjp)


@pytest.mark.parametrize("case", CORE, ids=str)
def test_vjp_applied_three_times(case: Case) -> None:
    def vjp(f: Function, *xs: Any) -> Any:
        out, pull = jax.vjp(floats(f), *xs)
        return [
            pull([factor * y for y in like(out)])
            for factor in (np.int8(1), np.int8(-2), np.int8(0))
        ]

    agree_on_differentiable(case, vjp)


@pytest.mark.parametrize("case", [case for case in CORE if case.size > 1], ids=str)
def test_grad_of_one_argument(case: Case) -> None:
    """Derivatives by the last differentiable leaf only; the others are constants of the trace."""
    agree_on_differentiable(case, lambda f, *xs: jax.grad(weighed(f), len(xs) - 1)(*xs))


@pytest.mark.parametrize("case", CORE, ids=str)
def test_grad_of_whole_arguments(case: Case) -> None:
    """jax.grad by positional arguments as they are, pytrees too; integers have float0 gradients."""
    x64 = own_precision(case)
    args, kwargs = case.draw(x64)

    def grad(fn: Function) -> Function:
        loss = lambda *args: weigh(fn(*args, **kwargs))  # noqa: E731
        return jax.grad(loss, every(args), allow_int=True)

    with precision(x64):
        arrays = jax.tree.map(jnp.asarray, args)
        expected = quick_jit(grad(case.twin))(*arrays)
        with looping_allowed(case):
            check(grad(bridge(case))(*arrays), expected, case.rtol, coarseness(case))


@pytest.mark.parametrize("case", [case for case in DIFFERENTIABLE if case.kwargs], ids=str)
def test_grad_of_keyword_arguments(case: Case, x64: bool) -> None:
    args, kwargs = case.draw(x64)
    with precision(x64):
        grads = [
            jax.grad(lambda kw, fn=fn: weigh(fn(*args, **kw)))(kwargs)
            for fn in (bridge(case), case.twin)
        ]
        check(*grads, case.rtol)


@pytest.mark.parametrize("case", CORE, ids=str)
def test_grad_through_surrounding_jax(case: Case) -> None:
    """JAX before and after the call."""

    def grad(f: Function, *xs: Any) -> Any:
        around = lambda *xs: jnp.tanh(weigh(f(*[(x * 1.0).astype(x.dtype) for x in xs]))) * 2  # noqa: E731
        return jax.grad(around, every(xs))(*xs)

    agree_on_differentiable(case, grad)
