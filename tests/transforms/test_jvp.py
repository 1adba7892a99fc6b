"""Forward mode, first order: jvp and linearize."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from cases import Case
from harness import CORE_FORWARD, FORWARD, Function, agree_on_differentiable, like


def jvp(f: Function, *xs: Any) -> Any:
    return jax.jvp(f, xs, like(xs))


def linearize(f: Function, *xs: Any) -> Any:
    out, push = jax.linearize(f, *xs)
    return out, push(*like(xs)), push(*[2 * t for t in like(xs)])


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_jvp(case: Case, x64: bool) -> None:
    agree_on_differentiable(case, jvp, x64=x64)


@pytest.mark.parametrize("case", CORE_FORWARD, ids=str)
def test_eager_jvp(case: Case) -> None:
    agree_on_differentiable(case, jvp, jit=False)


@pytest.mark.parametrize("case", [case for case in CORE_FORWARD if case.size > 1], ids=str)
def test_jvp_in_one_argument(case: Case) -> None:
    """Only the first leaf has a tangent."""

    def transform(f: Function, x: Any, *rest: Any) -> Any:
        return jax.jvp(lambda x: f(x, *rest), (x,), (like(x),))

    agree_on_differentiable(case, transform)


@pytest.mark.parametrize("case", CORE_FORWARD, ids=str)
def test_linearize(case: Case) -> None:
    agree_on_differentiable(case, linearize)


@pytest.mark.parametrize("case", CORE_FORWARD[::3], ids=str)
def test_eager_linearize(case: Case) -> None:
    agree_on_differentiable(case, linearize, jit=False)
