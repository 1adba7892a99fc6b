"""Second order: Hessians in the four orders of modes, and Hessian-vector products."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
from cases import Case
from harness import (
    CORE_TWICE,
    TWICE,
    Function,
    agree_on_differentiable,
    every,
    like,
    precision,
    weigh,
    weighed,
)

from torch2jax import torch2jax

SMALL = [case for case in CORE_TWICE if case.size <= 40]
MODES = {
    "fwd_fwd": (jax.jacfwd, jax.jacfwd),
    "rev_rev": (jax.jacrev, jax.jacrev),
    "rev_fwd": (jax.jacrev, jax.jacfwd),
}


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_hessian(case: Case) -> None:
    transform = lambda f, *xs: jax.hessian(weighed(f), every(xs))(*xs)  # noqa: E731
    agree_on_differentiable(case, transform, real=True, scale=10)


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("case", SMALL[::3], ids=str)
def test_hessian_in_other_modes(case: Case, modes: str) -> None:
    outer, inner = MODES[modes]
    agree_on_differentiable(
        case,
        lambda f, *xs: outer(inner(weighed(f), every(xs)), every(xs))(*xs),
        x64=True,
        real=True,
    )


@pytest.mark.parametrize("case", TWICE, ids=str)
def test_jvp_of_grad(case: Case) -> None:
    def hvp(f: Function, *xs: Any) -> Any:
        return jax.jvp(jax.grad(weighed(f), every(xs)), xs, like(xs))

    agree_on_differentiable(case, hvp, x64=True)


@pytest.mark.parametrize("case", CORE_TWICE, ids=str)
def test_grad_of_jvp(case: Case) -> None:
    def hvp(f: Function, *xs: Any) -> Any:
        return jax.grad(lambda *xs: weigh(jax.jvp(weighed(f), xs, like(xs))[1]), every(xs))(*xs)

    agree_on_differentiable(case, hvp, x64=True)


@pytest.mark.parametrize("case", CORE_TWICE, ids=str)
def test_grad_of_grad(case: Case) -> None:
    def hvp(f: Function, *xs: Any) -> Any:
        return jax.grad(lambda *xs: weigh(jax.grad(weighed(f), every(xs))(*xs)), every(xs))(*xs)

    agree_on_differentiable(case, hvp, x64=True)


@pytest.mark.parametrize("case", CORE_TWICE, ids=str)
def test_jvp_of_jvp(case: Case) -> None:
    def second(f: Function, *xs: Any) -> Any:
        push = lambda *xs: jax.jvp(weighed(f), xs, like(xs))  # noqa: E731
        return jax.jvp(push, xs, like(xs))

    agree_on_differentiable(case, second, x64=True)


@pytest.mark.parametrize("case", CORE_TWICE[::2], ids=str)
def test_linearized_grad(case: Case) -> None:
    """The linear part of a gradient, applied twice and then transposed: a Hessian is symmetric."""

    def transform(f: Function, *xs: Any) -> Any:
        _, hvp = jax.linearize(jax.grad(weighed(f), every(xs)), *xs)
        return hvp(*like(xs)), jax.linear_transpose(hvp, *xs)(tuple(like(xs)))

    agree_on_differentiable(case, transform, x64=True)


def test_an_operator_whose_third_pullback_torch_lacks() -> None:
    """The Hessian of a transposed convolution goes by forward over reverse mode."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1, 4, 3)), rng.normal(size=(4, 2, 2))

    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv_transpose1d(x, w, stride=2, output_padding=1).pow(3).sum()

    tensor, weight = torch.from_numpy(x), torch.from_numpy(w)
    expected = torch.autograd.functional.hessian(lambda x: fn(x, weight), tensor)
    with precision(True):
        hessian = jax.jit(jax.hessian(torch2jax(fn)))(x, w)
    np.testing.assert_allclose(hessian, expected.numpy(), rtol=1e-10)
