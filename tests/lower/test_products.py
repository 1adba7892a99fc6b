"""Products of what is scattered: derivatives of all orders, where places meet and factors are 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torch2jax import torch2jax

PLACES = np.array([0, 0, 1, 2, 2, 2, 1, 0])
START = jnp.array([1.0, 2.0, 0.0, 3.0])
FACTORS = jnp.array([2.0, 0.0, 3.0, 0.0, 0.0, 5.0, 0.5, 4.0])
WEIGHTS = jnp.arange(1.0, 5.0)

OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    "scatter_reduce": lambda x, s, i: x.scatter_reduce(0, i, s, "prod"),
    "scatter": lambda x, s, i: x.scatter(0, i, s, reduce="multiply"),
    "index_reduce": lambda x, s, i: x.index_reduce(0, i, s, "prod"),
}


def twin(x: jax.Array, s: jax.Array) -> jax.Array:
    """Each element times its factors, one after the other."""
    out = []
    for k in range(4):
        product = x[k]
        for i in np.nonzero(k == PLACES)[0]:
            product = product * s[i]
        out.append(product)
    return jnp.stack(out)


def close(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:index_reduce.*in beta")
@pytest.mark.parametrize("name", list(OPERATORS))
def test_derivatives_of_products(name: str) -> None:
    f = torch2jax(OPERATORS[name], lower=True)

    def product(x: jax.Array, s: jax.Array) -> jax.Array:
        return f(x, s, jnp.array(PLACES))

    def loss_of(of: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda x, s: (WEIGHTS * (of(x, s) + 1) ** 2).sum()

    close(product(START, FACTORS), twin(START, FACTORS))
    for transform in (
        lambda fn: jax.grad(loss_of(fn), (0, 1)),
        lambda fn: jax.jit(jax.jacfwd(fn, (0, 1))),
        lambda fn: jax.hessian(loss_of(fn), (0, 1)),
        lambda fn: jax.jit(jax.grad(lambda x, s: (jax.jacrev(fn, 1)(x, s) ** 3).sum(), 0)),
    ):
        close(transform(product)(START, FACTORS), transform(twin)(START, FACTORS))
    several = jnp.stack([START, 2 * START + 1])
    gradient = lambda fn: jax.jit(jax.vmap(jax.grad(loss_of(fn), (0, 1)), (0, None)))  # noqa: E731
    close(gradient(product)(several, FACTORS), gradient(twin)(several, FACTORS))


@pytest.mark.filterwarnings("ignore:index_reduce.*in beta")
@pytest.mark.parametrize("name", ["scatter_reduce", "index_reduce"])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("dim", [0, -1])
def test_products_along_a_dimension(name: str, include_self: bool, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, s = (torch.randn(4, 4, generator=generator, requires_grad=True) for _ in range(2))
    index = torch.randint(3, (4, 4) if name == "scatter_reduce" else (4,), generator=generator)
    reduce = getattr(torch, name)

    def fn(x: torch.Tensor, s: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return reduce(x, dim, index, s, "prod", include_self=include_self)

    out = fn(x, s, index)
    weights = torch.randn(out.shape, generator=generator)
    expected = torch.autograd.grad(out, (x, s), weights)
    arrays = [jnp.asarray(t.detach().numpy()) for t in (x, s, index)]
    f = torch2jax(fn, lower=True)
    found, pull = jax.vjp(lambda x, s: f(x, s, arrays[2]), *arrays[:2])
    close(found, out.detach().numpy())
    close(pull(weights.numpy()), [g.numpy() for g in expected])
