"""`output_shapes`: results that the user declares."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import precision
from option_functions import Counted, X, same, sds

from torch2jax import Size, torch2jax


@pytest.mark.parametrize(
    "shape",
    [sds(4), jnp.zeros(4), np.zeros(4, np.float32), torch.zeros(4), torch.Size([4]), Size([4])],
    ids=["struct", "array", "numpy", "tensor", "torch.Size", "Size"],
)
def test_output_shapes(shape: Any) -> None:
    fn = Counted(lambda a: {"y": (a * 2, None), "z": [a.sum()]})
    f = torch2jax(fn, output_shapes={"y": (shape, None), "z": [Size([])]})
    f.lower(X)
    assert fn.calls == 0
    expected = {"y": (X * 2, None), "z": [X.sum()]}
    same(f(X), expected)
    assert fn.calls == 1
    same(jax.jit(f)(X), expected)
    assert fn.calls == 2
    grad = jax.grad(lambda a: f(a)["y"][0].sum())
    grad(X)
    assert fn.real == fn.calls


def test_output_shapes_are_tracers() -> None:
    @jax.jit
    def run(a: jax.Array) -> jax.Array:
        return torch2jax(lambda a: a * 2, output_shapes=a + 1)(a)

    same(run(X), X * 2)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (("bfloat16",), "bfloat16"),
        (("bfloat16", "float16"), "float32"),
        (("float16", "int32"), "float16"),
        (("int32",), "float32"),
        (("complex64", "float32"), "complex64"),
    ],
)
def test_a_bare_size_has_the_result_type_of_the_float_inputs(
    inputs: tuple[str, ...], expected: str
) -> None:
    dtype = getattr(torch, expected)
    f = torch2jax(lambda *xs: sum(x.to(dtype) for x in xs), output_shapes=Size([3]))
    assert f(*(jnp.ones(3, d) for d in inputs)).dtype.name == expected


def test_a_bare_size_for_integers_with_x64() -> None:
    with precision(True):
        f = torch2jax(lambda a: a.double(), output_shapes=Size([3]))
        assert f(jnp.arange(3)).dtype == jnp.float64
