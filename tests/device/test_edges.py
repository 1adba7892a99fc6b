"""Edges of operators that PyTorch's own tests for devices have found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import precision
from torch.nn import functional

from torch2jax import device, torch2jax

device.enable()

# --- nothing to pool -----------------------------------------------------------------------------


def _max(n: int) -> Callable[[Any], Any]:
    return lambda x: getattr(functional, f"max_pool{n}d")(x, 2)


def _unpooled(n: int) -> Callable[[Any], Any]:
    def fn(x: Any) -> Any:
        y, places = getattr(functional, f"max_pool{n}d")(x, 2, return_indices=True)
        return getattr(functional, f"max_unpool{n}d")(y, places, 2)

    return fn


POOLS: dict[str, Callable[[int], Callable[[Any], Any]]] = {
    "max": _max,
    "unpooled": _unpooled,
    "average": lambda n: lambda x: getattr(functional, f"avg_pool{n}d")(x, 2),
    "adaptive average": lambda n: lambda x: getattr(functional, f"adaptive_avg_pool{n}d")(x, 3),
    "adaptive max": lambda n: lambda x: getattr(functional, f"adaptive_max_pool{n}d")(x, 3),
}


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", POOLS)
def test_a_batch_of_nothing_is_pooled(name: str, n: int) -> None:
    fn, shape = POOLS[name](n), (0, 2, *[6] * n)
    expected = fn(torch.ones(shape)).shape
    x = torch.ones(shape, device="jax", requires_grad=True)
    out = fn(x)
    out.sum().backward()
    assert out.shape == expected
    assert x.grad is not None
    assert x.grad.shape == shape
    lowered = torch2jax(fn, lower=True)
    assert lowered(jnp.ones(shape)).shape == expected
    assert jax.grad(lambda x: lowered(x).sum())(jnp.ones(shape)).shape == shape


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kind", ["avg", "max"])
def test_a_gradient_of_no_elements_is_refused(kind: str, n: int) -> None:
    pool: Any = getattr(functional, f"adaptive_{kind}_pool{n}d")
    for on in ("cpu", "jax"):
        out = pool(torch.ones(1, 2, *[6] * n, device=on, requires_grad=True), 0)
        with pytest.raises(RuntimeError, match="Expected grad_output to have non-zero size"):
            out.sum().backward()


# --- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_bag_of_half_precision_is_rounded_once(dtype: torch.dtype, mode: str) -> None:
    table = torch.linspace(0.9, 9.1, 20).reshape(5, 4).to(dtype)
    places = torch.arange(200) % 5
    factors = torch.linspace(0.1, 1.3, 200).to(dtype) if mode == "sum" else None
    offsets = torch.tensor([0, 70])

    def fn(table: Any, places: Any, offsets: Any, factors: Any) -> Any:
        return functional.embedding_bag(
            places, table, offsets, mode=mode, per_sample_weights=factors
        )

    wide = fn(table.double(), places, offsets, None if factors is None else factors.double())
    moved = [None if x is None else x.to("jax") for x in (table, places, offsets, factors)]
    assert torch.equal(fn(*moved).cpu(), wide.to(dtype))
    with precision(True):
        lowered = torch2jax(lambda *given: fn(*given).float(), lower=True)
        given = [None if x is None else x.jax() for x in moved]
        np.testing.assert_array_equal(lowered(*given), wide.to(dtype).float().numpy())
