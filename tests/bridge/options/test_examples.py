"""`examples`: the shapes and dtypes that a function is tried with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from option_functions import Counted, X, same, sds

from torch2jax import torch2jax

EXAMPLES = {
    "none": (),
    "tensors": ({"w": torch.ones(4)}, torch.ones(())),
    "parameters": ({"w": torch.nn.Parameter(torch.ones(4))}, torch.nn.Parameter(torch.ones(()))),
    "arrays": ({"w": jnp.ones(4)}, jnp.ones(())),
    "numpy": ({"w": np.ones(4, np.float32)}, np.float32(1)),
    "structs": ({"w": sds(4)}, sds()),
    "numbers": ({"w": sds(4)}, 1.0),
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_examples(kind: str) -> None:
    f = torch2jax(lambda tree, s: {"out": torch.sin(tree["w"]) * s}, *EXAMPLES[kind])
    twin = lambda tree, s: {"out": jnp.sin(tree["w"]) * s}  # noqa: E731
    tree = {"w": X}
    same(f(tree, 2.0), twin(tree, 2.0))
    same(jax.jit(f)(tree, np.float32(2)), twin(tree, 2.0))
    loss = lambda g: lambda tree, s: g(tree, s)["out"].sum()  # noqa: E731
    same(jax.grad(loss(f), (0, 1))(tree, 2.0), jax.grad(loss(twin), (0, 1))(tree, 2.0))


def test_examples_are_tracers() -> None:
    @jax.jit
    def run(a: jax.Array, b: jax.Array) -> jax.Array:
        return torch2jax(lambda a, b: a @ b, a, b)(a, b)

    same(run(np.eye(4, dtype=np.float32), X), X)
    same(jax.vmap(run, (None, 0))(np.eye(4, dtype=np.float32), np.stack([X, X])), np.stack([X, X]))
    same(jax.grad(lambda b: run(np.eye(4, dtype=np.float32), b).sum())(X), np.ones(4))


def test_example_kw_and_keyword_gradients() -> None:
    def fn(a: torch.Tensor, *, scale: torch.Tensor, shift: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.sin(a) * scale + shift["s"] ** 2

    def twin(a: Any, *, scale: Any, shift: Any) -> Any:
        return jnp.sin(a) * scale + shift["s"] ** 2

    kw = {"scale": np.float32(3), "shift": {"s": X}}
    for f in (
        torch2jax(fn),
        torch2jax(
            fn, torch.ones(4), example_kw={"scale": torch.ones(()), "shift": {"s": torch.ones(4)}}
        ),
    ):
        grad = lambda g: jax.grad(lambda a, kw: g(a, **kw).sum(), (0, 1))(X, kw)  # noqa: E731
        same(f(X, **kw), twin(X, **kw))
        same(grad(f), grad(twin))
        same(jax.jit(grad, static_argnums=0)(f), grad(twin))
        same(
            jax.vmap(lambda s, f=f: f(X, scale=s, shift={"s": X}))(X),
            jax.vmap(lambda s: twin(X, scale=s, shift={"s": X}))(X),
        )


def test_keywords_alone() -> None:
    f = torch2jax(lambda *, a, b: a - b)
    same(f(a=X, b=1.0), X - 1)
    same(f(b=1.0, a=X), X - 1)
    same(jax.grad(lambda b: f(a=X, b=b).sum())(1.0), -4.0)


def test_new_shapes_and_dtypes_at_every_call() -> None:
    fn = Counted(lambda a, b: a * b)
    f = torch2jax(fn, torch.ones(2), torch.ones(2))
    for shape in ((), (1,), (3,), (0,), (2, 3), (3, 1, 2)):
        for dtype in ("float32", "float16", "bfloat16", "int32", "int8", "uint8", "complex64"):
            a = jnp.ones(shape, dtype)
            out = f(a, a)
            assert (out.shape, out.dtype.name) == (shape, dtype)
    same(f(jnp.ones(3, jnp.bool_), X[:3]), X[:3])


@pytest.mark.parametrize("jit", [False, True])
def test_each_shape_is_traced_once(jit: bool) -> None:
    fn = Counted(lambda a: a * 2)
    f = torch2jax(fn)
    call = jax.jit(f) if jit else f
    for _ in range(3):
        call(X)
        call(X[:2])
    assert fn.real == 6
    assert fn.calls == 8  # one inference for each shape
