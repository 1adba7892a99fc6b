"""Second derivatives at ties and singular points are PyTorch's, in loops of JAX's as well.

JAX before 0.12 forgets the rule of a ``jax.custom_jvp`` in a loop that is differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax.experimental import jet
from jax.sharding import Mesh, PartitionSpec
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch2jax import torch2jax

PLACES = torch.tensor([0, 0, 1, 2])
MASK = torch.tensor([[True, False], [False, False]])


def attention(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(1, 2, 2)
    return F.scaled_dot_product_attention(rows, rows, rows, attn_mask=MASK).reshape(-1) * x


def recurrent(x: torch.Tensor) -> torch.Tensor:
    weights = [torch.eye(4), torch.eye(4)]
    rows, start = x.reshape(1, 1, 4), torch.zeros(1, 1, 4)
    return torch.rnn_relu(rows, start, weights, False, 1, 0.0, False, False, True)[0].reshape(-1)


CASES: dict[str, tuple[list[float], Callable[[torch.Tensor], torch.Tensor]]] = {
    "abs": ([0.0, 1.0, -2.0], torch.abs),
    "relu": ([0.0, 1.0, -1.0], lambda x: torch.relu(x) * x),
    "gelu": ([0.0, 1.0, -1.0], F.gelu),
    "mish": ([0.0, 1.0, -1.0], F.mish),
    "softsign": ([0.0, 1.0, -1.0], F.softsign),
    "logsigmoid": ([0.0, 1.0, -1.0], F.logsigmoid),
    "binary cross entropy": (
        [0.0, 1.0, -1.0],
        lambda x: F.binary_cross_entropy_with_logits(x, torch.full((3,), 0.3), reduction="none"),
    ),
    "l1": ([0.0, 1.0, -1.0], lambda x: F.l1_loss(x, x * 0, reduction="none")),
    "norm": ([1.0, 0.0, 2.0], lambda x: torch.linalg.vector_norm(x, 1) * x),
    "maximum": ([0.0, 1.0, 2.0], lambda x: torch.maximum(x, x * x)),
    "fmax": ([0.0, 1.0, 2.0], lambda x: torch.fmax(x, x * x)),
    "clamp": ([0.0, 1.0, 2.0], lambda x: torch.clamp(x * x, 0.0, 1.0)),
    "copysign": ([1.0, -1.0, 2.0], lambda x: torch.copysign(x * x, x)),
    "atan2": ([0.5, 1.0, -2.0], lambda x: torch.atan2(x, x * x)),
    "power": ([1.0, 2.0, 0.5], lambda x: x**x),
    "power at zero": ([0.0, 1.0, 2.0], lambda x: x ** torch.full_like(x, 3.0)),
    "logaddexp": ([0.0, 1.0, -1.0], lambda x: torch.logaddexp(x, x * x)),
    "logaddexp2": ([0.0, 1.0, -1.0], lambda x: torch.logaddexp2(x, x * x)),
    "elu": ([0.0, 1.0, -1.0], F.elu),
    "selu": ([0.0, 1.0, -1.0], F.selu),
    "celu": ([0.0, 1.0, -1.0], lambda x: F.celu(x, 1.5)),
    "norm of a zero": ([1.0, 0.0, 2.0], lambda x: torch.linalg.vector_norm(x) * x),
    "cosine": (
        [2.0, 2.0, 0.0, 1.0],
        lambda x: F.cosine_similarity(x.reshape(2, 2), x.flip(0).reshape(2, 2)).repeat(2) * x,
    ),
    "hypot": ([0.5, 1.0, -1.0], lambda x: torch.hypot(x, x * x)),
    "xlogy": ([0.0, 1.0, 2.0], lambda x: torch.xlogy(x, x + 2)),
    "xlog1py": ([0.0, 1.0, 2.0], lambda x: torch.special.xlog1py(x, x + 1)),
    "i1": ([0.0, 0.5, -1.0], torch.special.i1),
    "i0": ([0.0, 0.5, -1.0], torch.special.i0),
    "frexp": ([0.3, 1.0, -5.0], lambda x: torch.frexp(x)[0] * x),
    "median": ([2.0, 2.0, 0.0, 2.0, 5.0], lambda x: torch.median(x) * x),
    "nanmedian": ([2.0, 2.0, 0.0, 2.0, 5.0], lambda x: torch.nanmedian(x) * x),
    "product": ([0.0, 2.0, 2.0, 3.0], lambda x: (x * x).scatter_reduce(0, PLACES, x, "prod") * x),
    "attention": ([0.0, 1.0, 2.0, 3.0], attention),
    "recurrent": ([0.0, 1.0, -1.0, 2.0], recurrent),
}


def expected(fn: Any, at: list[float]) -> tuple[Any, Any]:
    """Return PyTorch's gradient and second derivatives of two terms that are alike."""
    x = torch.tensor(at, requires_grad=True)
    weights = torch.arange(1, len(at) + 1)
    with sdpa_kernel(SDPBackend.MATH):  # that of the CPU has no second derivative
        total = 2 * (fn(x) * weights).sum() ** 2
    (slope,) = torch.autograd.grad(total, x, create_graph=True)
    rows = [torch.autograd.grad(s, x, retain_graph=True)[0] for s in slope]
    return slope.detach().numpy(), torch.stack(rows).numpy()


def loops(f: Any) -> dict[str, Any]:
    def scanned(x: Any) -> Any:
        return jax.lax.scan(lambda c, row: (c + f(row), None), 0.0, jnp.stack([x, x]))[0]

    def carried(x: Any) -> Any:
        return jax.lax.scan(lambda c, _: ((c[0], c[1] + f(c[0])), None), (x, 0.0), None, 2)[0][1]

    return {
        "no loop": lambda x: f(x) + f(x),
        "map": lambda x: jax.lax.map(f, jnp.stack([x, x])).sum(),
        "vmap of a map": lambda x: jax.vmap(lambda w: jax.lax.map(f, w[None]))(
            jnp.stack([x, x])
        ).sum(),
        "scan": scanned,
        "carried": carried,
        "checkpoint": lambda x: 2 * jax.checkpoint(f)(x),
        "map of checkpoints": lambda x: jax.lax.map(jax.checkpoint(f), jnp.stack([x, x])).sum(),
    }


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_in_loops(name: str) -> None:
    at, fn = CASES[name]
    slope, curvature = expected(fn, at)
    lowered, weights = torch2jax(fn, lower="strict"), jnp.arange(1.0, len(at) + 1)
    all_loops = loops(lambda x: jnp.sum(lowered(x) * weights) ** 2)

    def derivatives(x: Any) -> Any:
        return {
            how: (jax.grad(f)(x), jax.jacrev(jax.grad(f))(x), jax.jacfwd(jax.grad(f))(x))
            for how, f in all_loops.items()
        }

    for how, found in jax.jit(derivatives)(jnp.asarray(at)).items():
        for got, want in zip(found, (slope, curvature, curvature), strict=True):
            np.testing.assert_allclose(got, want, 1e-3, 1e-3, err_msg=how)


def test_one_operand_has_rows() -> None:
    f = torch2jax(lambda a, b: torch.logaddexp(a, b) * torch.atan2(a, b), lower=True)
    a, b = jnp.asarray([0.5, 1.0]), jnp.asarray([0.5, 1.0, 2.0])
    outer = jax.vmap(jax.vmap(f, (None, 0)), (0, None))
    found = jax.jacfwd(jax.grad(lambda a: jax.lax.map(lambda a: outer(a, b), a[None]).sum()))(a)

    def total(a: torch.Tensor) -> torch.Tensor:
        x, y = a[:, None], torch.from_numpy(np.array(b))
        return (torch.logaddexp(x, y) * torch.atan2(x, y)).sum()

    want: Any = torch.autograd.functional.hessian(total, torch.from_numpy(np.array(a)))
    np.testing.assert_allclose(found, want.numpy(), 1e-4, 1e-5)


def test_on_several_devices() -> None:
    def fn(x: Any, w: Any) -> Any:
        return torch.median(torch.relu(x) * w.abs()) + torch.logaddexp(x, w).sum()

    f = torch2jax(fn, lower=True)
    x, w = jnp.arange(8.0).reshape(4, 2) * 0.3, jnp.asarray([0.7, 1.3])
    mesh = Mesh(np.array(jax.devices()[:4]), ("rows",))
    rows, everywhere = PartitionSpec("rows"), PartitionSpec()
    sharded = jax.shard_map(
        lambda x, w: f(x, w)[None], mesh=mesh, in_specs=(rows, everywhere), out_specs=rows
    )

    def derivatives(f: Any) -> Any:
        total = lambda x, w: f(x, w).sum()  # noqa: E731
        return (
            jax.grad(total, (0, 1))(x, w),
            jax.hessian(total, 1)(x, w),
            jax.jvp(f, (x, w), (x, w)),
        )

    found = derivatives(sharded)
    want = derivatives(lambda x, w: jnp.stack([f(row[None], w) for row in x]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), found, want)


def test_linear_operands() -> None:
    def tripled(x: Any) -> Any:
        return x.scatter_reduce(0, torch.tensor([0, 1, 1]), torch.full((3,), 3.0), "prod")

    transposed = jax.linear_transpose(torch2jax(tripled, lower=True), jnp.ones(3))
    np.testing.assert_array_equal(transposed(jnp.ones(3))[0], [3.0, 9.0, 1.0])


def test_taylor_series() -> None:
    x, one, zero = jnp.asarray([1.0, -2.0, 3.0]), jnp.ones(3), jnp.zeros(3)
    f = torch2jax(lambda x: torch.relu(x) * x.abs(), lower=True)
    if "custom_jvp" in str(jax.make_jaxpr(f)(x)):
        pytest.skip("jet takes no jax.custom_jvp, that of jax.nn.relu included")
    out, (first, second) = jet.jet(f, (x,), ([one, zero],))
    np.testing.assert_allclose(out, [1.0, 0.0, 9.0])
    np.testing.assert_allclose(first, [2.0, 0.0, 6.0])
    np.testing.assert_allclose(second, [2.0, 0.0, 2.0], atol=1e-5)
