"""Functions that the tests of the options wrap, and how their results are compared."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

X = np.arange(1, 5, dtype=np.float32)
F32 = jnp.float32


def sds(*shape: int, dtype: Any = F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def same(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance
        )


class Counted:
    """Calls of a torch function, on real tensors and at all."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self.calls = 0
        self.real = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.real += all(type(a) is torch.Tensor for a in args)
        return self.fn(*args, **kwargs)
