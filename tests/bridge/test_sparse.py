"""Sparse tensors inside a function: its gradients are dense, and its graphs are kept or copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torch2jax import from_module, torch2jax

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse (invariant checks|CSR tensor support)", "ignore:There is a performance drop"
)

TABLE = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
PLACES = jnp.array([0, 1, 1])

LOOKUPS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "embedding": lambda i, w: F.embedding(i, w, sparse=True),
    "embedding, padded": lambda i, w: F.embedding(i, w, 0, sparse=True),
    "embedding_bag": lambda i, w: F.embedding_bag(i[None], w, mode="sum", sparse=True),
    "torch.embedding": lambda i, w: torch.embedding(w, i, -1, False, True),
    "gather": lambda i, w: w.gather(0, i[:, None].long(), sparse_grad=True),
}


def twin(name: str, w: jax.Array) -> jax.Array:
    if name == "gather":
        return w[PLACES, :1]
    w = w.at[0].set(jax.lax.stop_gradient(w[0])) if name == "embedding, padded" else w
    return w[PLACES].sum(0, keepdims=True) if name == "embedding_bag" else w[PLACES]


@pytest.mark.parametrize("name", list(LOOKUPS))
@pytest.mark.parametrize("residuals", ["tape", "recompute"])
def test_sparse_gradients_are_dense(name: str, residuals: Literal["tape", "recompute"]) -> None:
    f = torch2jax(LOOKUPS[name], residuals=residuals)
    loss = lambda w: (f(PLACES, w) ** 3).sum()  # noqa: E731
    expected = lambda w: (twin(name, w) ** 3).sum()  # noqa: E731
    for transform in (jax.grad, lambda g: jax.jit(jax.grad(g))):
        np.testing.assert_allclose(transform(loss)(TABLE), jax.grad(expected)(TABLE), rtol=1e-5)
    several = jnp.stack([TABLE, -2 * TABLE])
    np.testing.assert_allclose(
        jax.vmap(jax.grad(loss))(several), jax.vmap(jax.grad(expected))(several), rtol=1e-5
    )
    np.testing.assert_allclose(
        jax.jacrev(lambda w: f(PLACES, w))(TABLE), jax.jacrev(lambda w: twin(name, w))(TABLE)
    )


@pytest.mark.parametrize("name", ["embedding", "embedding, padded", "torch.embedding"])
def test_second_derivatives_of_sparse_lookups(name: str) -> None:
    f = torch2jax(LOOKUPS[name])
    loss = lambda w: (f(PLACES, w) ** 3).sum()  # noqa: E731
    expected = lambda w: (twin(name, w) ** 3).sum()  # noqa: E731
    for twice in (jax.hessian, lambda g: jax.jacrev(jax.jacrev(g))):
        np.testing.assert_allclose(twice(loss)(TABLE), twice(expected)(TABLE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_modules_with_sparse_gradients(kind: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(kind(4, 3, sparse=True), torch.nn.Linear(3, 2))
    i = torch.tensor([[0, 1, 1], [2, 2, 1]])
    (module(i) ** 2).sum().backward()
    apply, variables = from_module(module)
    found = jax.jit(jax.grad(lambda v: (apply(v, i.numpy()) ** 2).sum()))(variables)["params"]
    for name, p in module.named_parameters():
        assert p.grad is not None
        np.testing.assert_allclose(found[name], p.grad.to_dense().numpy(), rtol=1e-5, atol=1e-6)


COO = torch.tensor([[0, 1, 2], [2, 0, 1]])
VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "to_dense": lambda v: torch.sparse_coo_tensor(COO, v, (3, 3)).to_dense() ** 2,
    "matmul": lambda v: (torch.sparse_coo_tensor(COO, v, (3, 3)) @ torch.ones(3, 2)) ** 2 / 2,
    "csr": lambda v: (
        torch.sparse.mm(
            torch.sparse_csr_tensor(torch.tensor([0, 1, 2, 3]), COO[1], v, (3, 3)), torch.eye(3)
        )
        ** 2
    ),
}


@pytest.mark.parametrize("name", list(VALUES))
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_values_of_a_sparse_matrix_are_an_operand(name: str, jit: bool) -> None:
    """At the first call, too, when it shows that the graph holds the operand."""
    gradient = jax.grad(lambda v: torch2jax(VALUES[name])(v).sum())
    gradient = jax.jit(gradient) if jit else gradient
    for v in (np.array([1.0, 2.0, 3.0], np.float32), np.array([4.0, 5.0, 6.0], np.float32)):
        np.testing.assert_allclose(gradient(v), 2 * v, rtol=1e-6)


def test_many_values_of_a_sparse_matrix() -> None:
    """More bytes than are copied whatever the graph holds."""
    n = 50_000
    fn = lambda v: torch.sparse_coo_tensor(torch.arange(n)[None], v, (n,)).to_dense() ** 2  # noqa: E731
    gradient = jax.jit(jax.grad(lambda v: torch2jax(fn)(v).sum()))
    v = np.arange(n, dtype=np.float32)
    for _ in range(2):
        np.testing.assert_allclose(gradient(v), 2 * v)


def test_second_derivatives_that_pytorch_lacks_are_an_error() -> None:
    fn = lambda v: (torch.sparse_coo_tensor(COO, v, (3, 3)) @ torch.ones(3, 2)) ** 3  # noqa: E731
    loss = lambda v: torch2jax(fn)(v).sum()  # noqa: E731
    v = jnp.array([1.0, 2.0, 3.0])
    for second in (
        lambda v: jax.jvp(jax.grad(loss), (v,), (v,))[1],
        lambda v: jax.jit(lambda v: jax.jvp(jax.grad(loss), (v,), (v,))[1])(v),
    ):
        with pytest.raises(Exception, match="does not differentiate this function's gradient"):
            second(v)
