"""Static arguments, named and by their types."""

from __future__ import annotations

import enum
from typing import Any

import jax
import numpy as np
import pytest
import torch
from option_functions import X, same

from torch2jax import SignatureError, torch2jax


def test_static_arguments() -> None:
    def fn(a: torch.Tensor, n: int, mode: str = "mul") -> torch.Tensor:
        assert type(n) is int
        return a * n if mode == "mul" else a + n

    f = torch2jax(fn, static_argnums=1)
    same(f(X, 3), 3 * X)
    same(f(X, 3, "add"), X + 3)
    same(f(X, 2, mode="add"), X + 2)
    same(jax.jit(lambda a: f(a, 5))(X), 5 * X)
    same(jax.grad(lambda a: f(a, 5).sum())(X), np.full(4, 5.0))
    same(jax.vmap(lambda a: f(a, 5))(X), 5 * X)
    same(torch2jax(lambda a, n: a * n, static_argnums=-1)(X, 3), 3 * X)


def test_static_names_and_numbers_are_the_same_argument() -> None:
    """As in jax.jit: either option finds the argument by position and by keyword."""

    def fn(a: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return a.reshape(shape)

    by_name = torch2jax(fn, static_argnames="shape")
    by_number = torch2jax(fn, static_argnums=1)
    same(by_name(X, shape=(2, 2)), X.reshape(2, 2))
    same(by_number(X, (2, 2)), X.reshape(2, 2))
    same(by_name(X, (2, 2)), X.reshape(2, 2))
    same(by_number(X, shape=(2, 2)), X.reshape(2, 2))


@pytest.mark.parametrize("order", [(True, 1, 1.0), (1.0, True, 1), (1, 1.0, True)])
def test_static_values_that_compare_equal_are_told_apart(order: tuple[Any, ...]) -> None:
    scale = {bool: 2, int: 3, float: 5}
    f = torch2jax(lambda a, n: a * scale[type(n)], static_argnums=1)
    for value in order:
        same(f(X, value), X * scale[type(value)])
        same(jax.jit(lambda a, v=value: f(a, v))(X), X * scale[type(value)])


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


STATICS = [True, "text", b"bytes", None, torch.float64, torch.device("cpu"), torch.Size([2, 2]), Color.RED, Level.LOW,
           slice(0, 2), slice(None), range(3), ..., torch.strided, torch.contiguous_format]  # fmt: skip


@pytest.mark.parametrize("value", STATICS, ids=repr)
@pytest.mark.parametrize("place", ["position", "keyword", "nested"])
def test_types_that_are_static_by_themselves(value: Any, place: str) -> None:
    got: list[Any] = []

    def fn(a: torch.Tensor, option: Any) -> torch.Tensor:
        got.append(option["deep"][0] if place == "nested" else option)
        return a * 2

    f = torch2jax(fn)
    given = {"deep": [value]} if place == "nested" else value
    call = (lambda a: f(a, option=given)) if place == "keyword" else (lambda a: f(a, given))
    same(call(X), X * 2)
    same(jax.jit(call)(X), X * 2)
    same(jax.vmap(call)(X), X * 2)
    same(jax.grad(lambda a: call(a).sum())(X), np.full(4, 2.0))
    assert all(type(g) is type(value) and g == value for g in got)


def test_numbers_are_operands() -> None:
    f = torch2jax(lambda a, n, s: a * n + s)
    same(f(X, 2, 0.5), 2 * X + 0.5)
    same(jax.grad(lambda s: f(X, 2, s).sum())(0.5), 4.0)
    with pytest.raises(SignatureError, match="static_argnums"):
        torch2jax(lambda a, n: a.repeat(n))(X, 2)
