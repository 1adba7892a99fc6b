"""`autograd.Function`s of other people's libraries, of the old style, in every mode.

They have a ``forward(ctx, ...)`` and no forward mode, which JAX makes from their backward pass. The
right values are PyTorch's own, by its double backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import entmax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import snntorch.surrogate
import torch
from torch.autograd import functional
from torchpme.lib.math import exp1

from torch2jax import torch2jax

pytestmark = pytest.mark.filterwarnings("ignore:.*called row by row under jax.vmap")


def spikes(x: torch.Tensor) -> torch.Tensor:
    """A step, whose derivative is that of something smooth."""
    return snntorch.surrogate.fast_sigmoid(slope=2)(x) * x


def integral(x: torch.Tensor) -> torch.Tensor:
    """Its forward pass has a way for small numbers, and one for large ones."""
    return exp1(x * x + 0.1)


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "entmax": lambda x: entmax.entmax15(x, dim=-1) * x,
    "entmax, sparsemax": lambda x: entmax.sparsemax(x * x, dim=-1),
    "entmax, bisection": lambda x: entmax.entmax_bisect(x, 1.5, n_iter=20) * x,
    "snntorch": spikes,
    "torch-pme": integral,
}
WAYS = [(name, lower) for name in FUNCTIONS for lower in (False, True)]
ASKS_FOR_VALUES = ("torch-pme", True)
"""It takes out the small numbers by a mask."""
WAYS.remove(ASKS_FOR_VALUES)
X = 0.2 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
V = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def loss(y: Any) -> Any:
    return (y * y).sum() + y.sum()


def close(found: Any, want: torch.Tensor) -> None:
    np.testing.assert_allclose(found, want.detach(), 1e-3, 1e-4)


def arrays() -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(X.numpy()), jnp.asarray(V.numpy())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode(name: str) -> None:
    fn = FUNCTIONS[name]
    f, (x, v) = torch2jax(lambda x: fn(x)), arrays()
    value, tangent = functional.jvp(fn, X, V)
    for wrap in (lambda g: g, jax.jit):
        y, dy = wrap(lambda x, v: jax.jvp(f, (x,), (v,)))(x, v)
        close(y, value)
        close(dy, tangent)
    close(jax.jacfwd(f)(x), functional.jacobian(fn, X))
    # Reverse over forward.
    row = functional.vhp(lambda x: loss(fn(x)), X, V)[1]
    close(jax.grad(lambda x: jax.jvp(lambda x: loss(f(x)), (x,), (v,))[1])(x), row)


@pytest.mark.parametrize(("name", "lower"), WAYS)
def test_reverse_mode(name: str, lower: bool) -> None:
    fn = FUNCTIONS[name]
    f, (x, v) = torch2jax(lambda x: fn(x), lower=lower), arrays()
    value, gradient = functional.vjp(fn, X, V)
    close(jax.jit(f)(x), value)
    pull = lambda v: jax.vjp(f, x)[1](v)[0]  # noqa: E731
    close(jax.jit(pull)(v), gradient)
    close(jax.vmap(pull)(jnp.stack([v, 2 * v])), torch.stack([gradient, 2 * gradient]))


@pytest.mark.parametrize(("name", "lower"), WAYS)
def test_second_derivatives(name: str, lower: bool) -> None:
    """Some save their result, through which the second derivative goes."""
    fn = FUNCTIONS[name]
    f, (x, v) = torch2jax(lambda x: fn(x), lower=lower), arrays()
    want = functional.hessian(lambda x: loss(fn(x)), X)
    assert torch.isfinite(want).all()
    for hessian in (jax.hessian, lambda f: jax.jacrev(jax.jacrev(f))):
        close(jax.jit(hessian(lambda x: loss(f(x))))(x), want)
    row = torch.einsum("ijkl,kl->ij", want, V)
    close(jax.jvp(jax.grad(lambda x: loss(f(x))), (x,), (v,))[1], row)
