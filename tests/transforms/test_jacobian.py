"""Full Jacobians: forward over a basis of tangents, reverse over a basis of cotangents."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
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

from torch2jax import torch2jax

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


PUSHED_WRONG = {
    "scatter_reduce": lambda x, y: torch.scatter_reduce(x, 0, (y > 0).long(), y, "prod"),
    "cholesky": lambda x, y: torch.linalg.cholesky(x @ x.mT + torch.eye(3)) * y,
    "cholesky_of_all_entries": lambda x, y: torch.linalg.cholesky(x + 9 * torch.eye(3)) * y,
    "eigh": lambda x, y: torch.linalg.eigh(x + torch.diag(3.0 ** torch.arange(3))).eigenvalues * y,
    "triangular_solve": lambda x, y: torch.triangular_solve(y, x + 9 * torch.eye(3)).solution,
}


@pytest.mark.filterwarnings("ignore")  # deprecated operators; batches that loop
@pytest.mark.parametrize("name", PUSHED_WRONG)
def test_forward_mode_agrees_with_reverse_mode_where_that_of_torch_does_not(name: str) -> None:
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(3, 3)), jnp.float32) for _ in range(2))
    f = torch2jax(PUSHED_WRONG[name])
    for forward, reverse in zip(
        jax.jit(jax.jacfwd(f, (0, 1)))(x, y), jax.jacrev(f, (0, 1))(x, y), strict=True
    ):
        np.testing.assert_allclose(forward, reverse, rtol=1e-4, atol=1e-5)
