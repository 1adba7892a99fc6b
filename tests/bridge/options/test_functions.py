"""Functions of all kinds, in programs of all kinds."""

from __future__ import annotations

import collections
import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from option_functions import X, same, sds

from torch2jax import SignatureError, Size, torch2jax


class Adder:
    def __init__(self, w: float) -> None:
        self.w = torch.full((4,), w)

    def __call__(self, a: torch.Tensor) -> torch.Tensor:
        return a + self.w

    def method(self, a: torch.Tensor) -> torch.Tensor:
        return a + self.w

    @classmethod
    def of_class(cls, a: torch.Tensor) -> torch.Tensor:
        return a + 2

    @staticmethod
    def static(a: torch.Tensor) -> torch.Tensor:
        return a + 2


@torch.jit.script
def scripted(a: torch.Tensor) -> torch.Tensor:
    return a + 2


KINDS: dict[str, Any] = {
    "object": Adder(2),
    "bound": Adder(2).method,
    "classmethod": Adder.of_class,
    "staticmethod": Adder.static,
    "partial": functools.partial(torch.add, other=2),
    "partial of tensor": functools.partial(torch.add, torch.full((4,), 2.0)),
    "nested partial": functools.partial(functools.partial(lambda a, b, c: a + b + c, c=1), b=1),
    "builtin": lambda a: torch.ops.aten.add.Scalar(a, 2),
    "module": torch.nn.Sequential(
        torch.nn.Identity(), type("Add", (torch.nn.Module,), {"forward": lambda s, a: a + 2})()
    ),
    "scripted": scripted,
    "compiled": torch.compile(lambda a: a + 2, backend="eager"),
    "compiled with aot": torch.compile(lambda a: a + 2, backend="aot_eager"),
    "no_grad": torch.no_grad()(lambda a: a + 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_functions_of_all_kinds(kind: str) -> None:
    f = torch2jax(KINDS[kind])
    same(f(X), X + 2)
    same(jax.jit(f)(X), X + 2)
    slope = 0.0 if kind == "no_grad" else 1.0
    same(jax.grad(lambda a: f(a).sum())(X), np.full(4, slope))
    same(jax.jit(jax.jacrev(f))(X), slope * np.eye(4))
    assert isinstance(f.__name__, str)
    assert isinstance(repr(f), str)
    assert f.lower(sds(4)).as_text()


def test_many_arguments_and_results() -> None:
    f = torch2jax(lambda *xs: [x * i for i, x in enumerate(xs)])
    out = jax.jit(f)(*[X] * 200)
    same(out[7], X * 7)
    grads = jax.grad(lambda *xs: sum(o.sum() for o in f(*xs)), (0, 199))(*[X] * 200)
    same(grads, (np.zeros(4), np.full(4, 199.0)))
    same(jax.vmap(f)(*[X] * 200)[3], X * 3)


Point = collections.namedtuple("Point", "x y")


def test_trees() -> None:
    f = torch2jax(lambda p, d, n: (Point(p.y, p.x), {"z": [d["a"][0] * 2], "a": None}, [], n))
    out = f(Point(X, X + 1), {"a": (X,)}, None)
    assert type(out[0]) is Point
    same(out, (Point(X + 1, X), {"z": [X * 2], "a": None}, [], None))
    same(jax.jit(lambda p: f(p, {"a": (X,)}, None))(Point(X, X + 1))[0], Point(X + 1, X))


@pytest.mark.parametrize("transform", ["disable_jit", "nested_jit", "remat", "scan", "while"])
def test_in_programs(transform: str) -> None:
    def run(g: Any) -> Any:
        loss = lambda a: g(a).sum()  # noqa: E731
        if transform == "disable_jit":
            with jax.disable_jit():
                return g(X), jax.grad(loss)(X), jax.vmap(g)(X)
        if transform == "nested_jit":
            return jax.jit(lambda a: jax.jit(jax.jit(g))(a) + g(a))(X)
        if transform == "remat":
            return jax.grad(jax.checkpoint(lambda a: jax.checkpoint(g)(jnp.cos(a)).sum()))(X)
        if transform == "scan":
            inner = lambda c, xs: jax.lax.scan(lambda c, x: (g(c * x), c), c, xs)[0]  # noqa: E731
            return jax.vmap(jax.grad(inner))(X, np.stack([X] * 4))
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, g(s[1])), (0, X))[1]

    same(run(torch2jax(lambda a: torch.sin(a))), run(jnp.sin))


def test_concurrent_calls() -> None:
    f = torch2jax(lambda a, b: torch.sin(a) @ b)

    def work(i: int) -> None:
        a, b = np.full((4 + i % 3, 4), i, np.float32), np.ones((4, 2), np.float32)
        for _ in range(10):
            same(f(a, b), np.sin(a) @ b)
            same(jax.grad(lambda a: f(a, b).sum())(a), 2 * np.cos(a))

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("vmap_method", "loop"),
        ("depth", -1),
        ("depth", 1.5),
        ("residuals", "keep"),
        ("nondiff_argnums", 7),
        ("inplace_argnums", 7),
        ("arg_dtypes", {"nobody": torch.int64}),
        ("arg_dtypes", (np.float32,)),
        ("nondiff_mask", (True, True, True)),
        ("output_shapes", {"a": 3}),
    ],
)
def test_wrong_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(SignatureError, match=option):
        torch2jax(lambda a: a * 1, **{option: value})(X)


def test_no_context_is_left_open() -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.checking_leaks())
        f = torch2jax(lambda a: torch.sin(a))
        same(jax.jit(jax.grad(lambda a: f(a).sum()))(X), np.cos(X))
        same(jax.vmap(f)(X), np.sin(X))


@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev, jax.hessian, jax.vmap])
def test_declared_shapes_under_transforms(transform: Any) -> None:
    f = torch2jax(lambda a: torch.sin(a) * a, output_shapes=Size([4]))
    twin = lambda a: jnp.sin(a) * a  # noqa: E731
    if transform is jax.vmap:
        rows = jnp.stack([X, 2 * X])
        same(jax.vmap(jax.jacfwd(f))(rows), jax.vmap(jax.jacfwd(twin))(rows))
    else:
        same(transform(f)(X), transform(twin)(X))
