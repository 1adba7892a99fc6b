"""`arg_dtypes`, and the types of 64 bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import precision
from option_functions import F32, X, same

from torch2jax import Torch2JaxWarning, torch2jax


def seen_dtypes() -> tuple[dict[str, torch.dtype], Any]:
    seen: dict[str, torch.dtype] = {}

    def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.update(a=a.dtype, b=b.dtype)
        return a * 1

    return seen, fn


@pytest.mark.parametrize(
    "given",
    [(torch.int64, None), [torch.int64, None], {"a": torch.int64}, torch.int64],
    ids=["tuple", "list", "name", "prefix"],
)
def test_arg_dtypes(given: Any) -> None:
    seen, fn = seen_dtypes()
    f = torch2jax(fn, arg_dtypes=given)
    out = f(np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32))
    assert seen["a"] is torch.int64
    assert seen["b"] is (torch.int64 if given is torch.int64 else torch.int32)
    assert out.dtype == jnp.int32


def test_arg_dtypes_of_floats_carry_gradients() -> None:
    seen, fn = seen_dtypes()
    f = torch2jax(fn, arg_dtypes=(torch.float64, None))
    same(jax.grad(lambda a: f(a, X).sum())(X), np.ones(4))
    same(jax.hessian(lambda a: (f(a, X) ** 2).sum())(X), 2 * np.eye(4))
    same(jax.vmap(f)(X, X), X)
    assert seen["a"] is torch.float64
    assert f(X, X).dtype == F32


@pytest.mark.parametrize(
    "example",
    [torch.arange(3), np.arange(3), jax.ShapeDtypeStruct((3,), np.int64)],
    ids=["tensor", "numpy", "struct"],
)
def test_64_bit_examples_with_x64_off(example: Any) -> None:
    seen, fn = seen_dtypes()
    f = torch2jax(fn, example, example)
    assert f(np.arange(3, dtype=np.int32), np.arange(3)).dtype == jnp.int32
    assert seen == {"a": torch.int64, "b": torch.int64}


def test_int32_is_what_fn_sees_otherwise() -> None:
    seen, fn = seen_dtypes()
    torch2jax(fn)(np.arange(3), np.arange(3))
    assert seen == {"a": torch.int32, "b": torch.int32}


def test_refused_int32_is_tried_again_as_int64_with_one_note() -> None:
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if labels.dtype is not torch.int64:  # in Python, where no operator says it
            raise TypeError("labels must be int64")
        return torch.nn.functional.cross_entropy(logits, labels)

    f = torch2jax(loss)
    logits, labels = (
        np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32),
        np.array([0, 2, 1, 1, 0]),
    )
    twin = lambda z: -jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], 1).mean()  # noqa: E731
    with pytest.warns(Torch2JaxWarning, match=r"args\[1\].*int64") as caught:
        out = f(logits, labels)
    assert len(caught) == 1
    same(out, twin(logits))
    same(jax.grad(f)(logits, labels), jax.grad(twin)(logits))
    same(
        f(logits[:2], labels[:2]), -jax.nn.log_softmax(logits[:2])[np.arange(2), labels[:2]].mean()
    )


def test_with_x64_on_nothing_changes_dtype() -> None:
    with precision(True):
        seen, fn = seen_dtypes()
        out = torch2jax(fn)(jnp.arange(3), jnp.ones(3))
        assert seen == {"a": torch.int64, "b": torch.float64}
        assert out.dtype == jnp.int64
        assert (
            torch2jax(fn)(jnp.ones(3, jnp.float32), jnp.arange(3, dtype=jnp.int32)).dtype
            == jnp.float32
        )
        assert seen == {"a": torch.float32, "b": torch.int32}
        labels = torch2jax(lambda i: torch.nn.functional.one_hot(i, 3))(jnp.arange(3))
        assert labels.dtype == jnp.int64


def test_x64_switched_between_calls() -> None:
    f = torch2jax(lambda a: (a.sum(), a.to(torch.float64)))
    for on in (False, True, False):
        with precision(on):
            total, wide = f(jnp.arange(3))
            assert total.dtype == (jnp.int64 if on else jnp.int32)
            assert wide.dtype == (jnp.float64 if on else jnp.float32)


def test_64_bit_results_with_x64_off() -> None:
    f = torch2jax(lambda a: (a.double(), a.long(), a.to(torch.complex128), a.argmax()))
    assert [o.dtype.name for o in f(X)] == ["float32", "int32", "complex64", "int32"]
    with pytest.raises(RuntimeError, match="jax_enable_x64"):
        jax.block_until_ready(torch2jax(lambda a: a.long() * 2**40)(X))
    same(jax.grad(lambda a: f(a)[0].sum())(X), np.ones(4))
