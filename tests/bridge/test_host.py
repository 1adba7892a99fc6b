"""Calls on a platform without a handler, such as a TPU: here the CPU plays one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import precision
from jax.interpreters import mlir
from process_state import changes, process_state

from torch2jax import from_module, torch2jax
from torch2jax._bridge.jax_side import lowering
from torch2jax._bridge.jax_side.primitive import torch_call_p


@pytest.fixture(autouse=True)
def _without_a_handler() -> Iterator[None]:
    jax.clear_caches()
    mlir.register_lowering(torch_call_p, lowering.lower_on_host, platform="cpu")
    yield
    lowering.lower_for_handlers()
    jax.clear_caches()


X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * y


def twin(x: Any, y: Any) -> Any:
    return jnp.tanh(x) * y


def test_the_program_has_no_custom_call_of_ours() -> None:
    text = jax.jit(torch2jax(fn)).lower(X, X).as_text()
    assert "callback" in text
    assert "@torch2jax" not in text


@pytest.mark.parametrize(
    "transform",
    [
        jax.jit,
        lambda f: f,
        lambda f: jax.jit(jax.grad(lambda x, y: f(x, y).sum(), (0, 1))),
        lambda f: jax.jit(jax.jacfwd(f)),
        lambda f: jax.jit(jax.hessian(lambda x, y: (f(x, y) ** 2).sum())),
        lambda f: jax.jit(jax.vmap(jax.grad(lambda x, y: f(x, y).sum()))),
        lambda f: lambda x, y: jax.lax.scan(lambda c, row: (f(c, row), c), x[0], y),
    ],
    ids=["jit", "eager", "grad", "jacfwd", "hessian", "vmap_grad", "scan"],
)
def test_transforms(transform: Any) -> None:
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6),
        transform(torch2jax(fn))(X, X + 1),
        transform(twin)(X, X + 1),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "int32", "bool", "complex64", "float8_e5m2"])
def test_dtypes(dtype: str) -> None:
    x = X.astype(dtype)
    out = jax.jit(torch2jax(lambda a: (a.mT.clone(), a.reshape(-1)[:0], a[0, 0])))(x)
    for got, want in zip(out, (x.mT, x.reshape(-1)[:0], x[0, 0]), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_in_place_and_out() -> None:
    f = torch2jax(lambda a: a.add_(1), inplace_argnums=0)
    out, updated = jax.jit(f)(X)
    np.testing.assert_allclose(updated, X + 1)
    np.testing.assert_allclose(out, X + 1)
    g = torch2jax(lambda a, out=None: torch.mul(a, 2, out=out), out_arg="out", output_shapes=X)
    np.testing.assert_allclose(jax.jit(g)(X), 2 * X)


def test_modules_and_dropout() -> None:
    """The graph is kept on the host too: one mask for both passes."""
    apply, variables = from_module(
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    )

    def loss(x: Any) -> Any:
        y, _ = apply(variables, x, train=True, rng=jax.random.key(0))
        return y.sum(), y

    (_, y), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(X)
    weight = variables["params"]["0.weight"]
    np.testing.assert_allclose(grad, 2.0 * (np.asarray(y) != 0) @ weight, rtol=1e-5, atol=1e-6)


def test_side_effects_happen() -> None:
    seen: list[float] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch._subclasses.FakeTensor):
            seen.append(float(x.sum()))
        return x

    @jax.jit
    def program(x: Any) -> Any:
        torch2jax(note, side_effects=True)(x)
        return x * 2

    for _ in range(2):
        jax.block_until_ready(program(X))
    jax.effects_barrier()
    assert len(seen) == 2


def test_errors_name_the_function() -> None:
    def raising(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch._subclasses.FakeTensor):
            raise ValueError("on the host")
        return x

    with pytest.raises(Exception, match="on the host"):
        jax.block_until_ready(jax.jit(torch2jax(raising))(X))


def test_what_a_test_leaves_behind_is_seen() -> None:
    """See _process_left_as_it_was, which every test goes through."""
    before = process_state()
    assert changes(before) == {}
    with precision(True):
        assert set(changes(before)) == {"jax_enable_x64"}
    lowering.lower_for_handlers()
    assert set(changes(before)) == {"lowerings"}
    at_handlers = process_state()
    mlir.register_lowering(torch_call_p, lowering._lower, platform="cpu")
    assert set(changes(at_handlers)) == {"lowerings"}
