"""Full Jacobians: forward over a basis of tangents, reverse over a basis of cotangents."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from cases import Case
from harness import (
    CORE,
    CORE_FORWARD,
    DIFFERENTIABLE,
    FORWARD,
    Function,
    agree_on_differentiable,
    every,
    floats,
)

HOLOMORPHIC = [
    case
    for case in FORWARD
    if case.name in ("holomorphic", "fft", "complex_matmul", "complex_solve")
]


def jacfwd(f: Function, *xs: Any) -> Any:
    return jax.jacfwd(floats(f), every(xs))(*xs)


def jacrev(f: Function, *xs: Any) -> Any:
    return jax.jacrev(floats(f), every(xs))(*xs)


@pytest.mark.parametrize("case", CORE_FORWARD, ids=str)
def test_jacfwd(case: Case) -> None:
    agree_on_differentiable(case, jacfwd, real=True)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_jacrev(case: Case) -> None:
    agree_on_differentiable(case, jacrev, real=True)


@pytest.mark.parametrize("case", CORE[::3], ids=str)
def test_eager_jacrev(case: Case) -> None:
    agree_on_differentiable(case, jacrev, real=True, jit=False)


@pytest.mark.parametrize("case", HOLOMORPHIC, ids=str)
@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev], ids=["jacfwd", "jacrev"])
def test_holomorphic(case: Case, jacobian: Any, x64: bool) -> None:
    """Jacobians of complex functions as complex matrices."""
    agree_on_differentiable(
        case, lambda f, *xs: jacobian(f, every(xs), holomorphic=True)(*xs), x64=x64
    )
