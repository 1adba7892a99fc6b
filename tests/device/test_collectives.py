"""torch.distributed's functional collectives inside of ``device.shard_map``, on eight devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from jax.sharding import AxisType, PartitionSpec

from torch2jax import device
from torch2jax._errors import SignatureError

P = PartitionSpec
device.enable()
N = 8


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    """PyTorch's own group of eight ranks of which this process is one; it sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=N, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def mapped(fn: Any, x: torch.Tensor, axes: Any = ("ranks",), shape: Any = (N,), **more: Any) -> Any:
    """Map over the first dimension of ``x``; each result is one row of what comes back."""
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
    spec = P(axes)
    options = {"mesh": mesh, "in_specs": spec, "out_specs": spec, **more}
    rows = device.mark_sharding(x.to("jax"), spec, mesh)
    return device.shard_map(lambda x: fn(x[0])[None], **options)(rows)


def each(values: Any) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(values)] * N)


X = torch.arange(N * 16.0).reshape(N, 16) % 7 + 1
ROWS = X.numpy()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sum", each(ROWS.sum(0))),
        ("avg", each(ROWS.mean(0))),
        ("max", each(ROWS.max(0))),
        ("min", each(ROWS.min(0))),
        ("product", each(ROWS.prod(0))),
    ],
)
def test_reductions(group: Any, kind: str, expected: Any) -> None:
    got = mapped(lambda x: collectives.all_reduce(x, kind, group), X)
    np.testing.assert_allclose(got.cpu(), expected, rtol=1e-5)
    got = mapped(lambda x: collectives.reduce_scatter_single(x, kind, 0, group), X)
    np.testing.assert_allclose(got.cpu(), expected[0].reshape(N, 2), rtol=1e-5)


def test_results_go_on_as_tensors(group: Any) -> None:
    got = mapped(lambda x: (collectives.all_reduce(x, "sum", group) * 2).sin() + x, X)
    np.testing.assert_allclose(got.cpu(), np.sin(2 * each(ROWS.sum(0))) + ROWS, rtol=1e-4)
    got = mapped(lambda x: collectives.all_reduce_coalesced([x, x + 1], "sum", group)[1], X)
    np.testing.assert_allclose(got.cpu(), each(ROWS.sum(0) + N))

    def in_place(x: Any) -> Any:
        y = x.clone()
        torch.ops._c10d_functional.all_reduce_(y, "sum", group.group_name)
        return torch.ops._c10d_functional.wait_tensor(y)

    np.testing.assert_allclose(mapped(in_place, X).cpu(), each(ROWS.sum(0)))


def into(make: Any, collective: Any) -> Any:
    """Return a function whose result a collective of PyTorch writes, as programs call them."""

    def run(x: Any) -> Any:
        out = make(x)
        assert collective(out, x) is None
        return out[1] if isinstance(out, list) else out

    return run


def work_of(out: Any, x: Any) -> None:
    work = dist.all_reduce(out, async_op=True)
    work.wait()
    assert work.is_completed()


LIST = lambda x: list(torch.empty_like(x.reshape(N, -1)))  # noqa: E731
EXCHANGED = ROWS.reshape(N, N, 2).swapaxes(0, 1)


# PyTorch 2.13 has further names for two of them, which older ones lack.
@pytest.mark.filterwarnings("ignore:.*_tensor. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("make", "collective", "expected"),
    [
        (torch.clone, lambda out, x: dist.all_reduce(out), each(ROWS.sum(0))),
        (torch.clone, work_of, each(ROWS.sum(0))),
        (torch.clone, lambda out, x: dist.all_reduce(out, dist.ReduceOp.MAX), each(ROWS.max(0))),
        (torch.clone, lambda out, x: dist.all_reduce(out, dist.ReduceOp.AVG), each(ROWS.mean(0))),
        (torch.clone, lambda out, x: dist.broadcast(out, 3), each(ROWS[3])),
        (
            lambda x: x.new_empty(N * 16),
            lambda out, x: dist.all_gather_into_tensor(out, x),
            each(ROWS.reshape(-1)),
        ),
        (
            lambda x: x.new_empty(N, 16),
            lambda out, x: dist.all_gather_into_tensor(out, x),
            each(ROWS),
        ),
        (
            lambda x: [torch.empty_like(x) for _ in range(N)],
            lambda out, x: dist.all_gather(out, x),
            each(ROWS[1]),
        ),
        (
            lambda x: x.new_empty(2),
            lambda out, x: dist.reduce_scatter_tensor(out, x),
            ROWS.sum(0).reshape(N, 2),
        ),
        (
            lambda x: x.new_empty(2),
            lambda out, x: dist.reduce_scatter(out, list(x.reshape(N, 2)), dist.ReduceOp.MIN),
            ROWS.min(0).reshape(N, 2),
        ),
        (
            torch.empty_like,
            lambda out, x: dist.all_to_all_single(out, x),
            EXCHANGED.reshape(N, 16),
        ),
        (
            LIST,
            lambda out, x: dist.all_to_all(out, list(x.reshape(N, 2))),
            EXCHANGED[:, 1],
        ),
    ],
)
def test_collectives_that_write(group: Any, make: Any, collective: Any, expected: Any) -> None:
    got = mapped(into(make, collective), X)
    np.testing.assert_allclose(got.cpu(), expected, rtol=1e-6)


def test_what_one_device_does_alone_is_refused(group: Any) -> None:
    parts = lambda x: list(torch.empty_like(x).reshape(N, -1))  # noqa: E731
    for f, message in (
        (lambda x: dist.reduce(x, 0), r"distributed\.reduce .* Use all_reduce"),
        (lambda x: dist.gather(x[:2], parts(x), 0), r"distributed\.gather .* Use all_gather"),
        (lambda x: dist.scatter(x[:2], parts(x), 0), r"distributed\.scatter "),
        (lambda x: dist.send(x, 1), r"distributed\.send .* Use all_to_all_single"),
        (lambda x: dist.recv(x, 1), r"distributed\.recv "),
    ):
        with pytest.raises(NotImplementedError, match=message):
            mapped(f, X)


def test_gathering_exchanging_and_broadcasting(group: Any) -> None:
    got = mapped(lambda x: collectives.all_gather_single(x, 0, group), X)
    np.testing.assert_array_equal(got.cpu(), each(ROWS.reshape(-1)))
    wide = X.reshape(N, 4, 4)
    got = mapped(lambda x: collectives.all_gather_single(x, 1, group), wide)
    np.testing.assert_array_equal(got.cpu(), each(np.concatenate(list(wide.numpy()), 1)))
    got = mapped(lambda x: collectives.reduce_scatter_single(x, "sum", 1, group), X[:, None])
    np.testing.assert_allclose(got.cpu().reshape(-1), ROWS.sum(0))
    got = mapped(lambda x: collectives.all_to_all_single(x, None, None, group), X)
    parts = ROWS.reshape(N, N, 2).swapaxes(0, 1)
    np.testing.assert_array_equal(got.cpu(), parts.reshape(N, 16))
    for x in (X, X > 3, X.int()):
        got = mapped(lambda x: collectives.broadcast(x, 3, group), x)
        np.testing.assert_array_equal(got.cpu(), each(x[3]))
        assert got.dtype is x.dtype


def test_a_group_is_an_axis_of_its_name() -> None:
    def f(x: Any) -> Any:
        return torch.ops._c10d_functional.all_reduce(x, "sum", "model")

    got = mapped(f, X, ("data", "model"), (2, 4))
    halves = [np.stack([half.sum(0)] * 4) for half in (ROWS[:4], ROWS[4:])]
    np.testing.assert_allclose(got.cpu(), np.concatenate(halves))

    def g(x: Any) -> Any:
        return torch.ops._c10d_functional.all_gather_into_tensor(x, 4, "any")

    got = mapped(g, X, ("data", "torch_dist"), (2, 4))
    np.testing.assert_array_equal(got.cpu()[0], ROWS[:4].reshape(-1))


def test_gradients_go_through_a_collective() -> None:
    def loss(x: Any) -> Any:
        total = torch.ops._c10d_functional.all_reduce(x * x, "sum", "ranks")
        return total.sum()[None]

    mesh = jax.make_mesh((N,), ("ranks",), axis_types=(AxisType.Auto,))
    f = jax.shard_map(device.jax_view(loss), mesh=mesh, in_specs=P("ranks"), out_specs=P())
    x = jnp.asarray(ROWS)
    np.testing.assert_allclose(jax.grad(lambda x: f(x).sum())(x), 2 * x, rtol=1e-6)


def test_refusals(group: Any) -> None:
    x = torch.ones(N, 8)
    for f, error, message in (
        (lambda x: collectives.all_reduce(x, "bxor", group), NotImplementedError, "'bxor'"),
        (
            lambda x: torch.ops._c10d_functional.all_gather_into_tensor(x, 2, "ranks"),
            SignatureError,
            "group of 2 ranks.*axis 'ranks' of 8",
        ),
        (
            lambda x: collectives.all_to_all_single(x, [1] * 8, [2] + [1] * 6 + [0], group),
            NotImplementedError,
            "equal parts",
        ),
        (
            lambda x: torch.ops._c10d_functional.reduce_scatter_tensor(x[:5], "sum", 8, "ranks"),
            RuntimeError,
            "5 rows",
        ),
    ):
        with pytest.raises(error, match=message):
            mapped(f, x)
    with pytest.raises(SignatureError, match=r"inside of device\.shard_map"):
        collectives.all_reduce(x.to("jax"), "sum", group)
    alone = torch.ops._c10d_functional.all_gather_into_tensor(x.to("jax"), 1, "any")
    assert torch.equal(alone.cpu(), x)
