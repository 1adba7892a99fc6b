"""Results on the host go to XLA's buffers in the order of its stream, without a wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fake_gpu import entry
from raw_calls import setup

from torch2jax import torch2jax

LARGE = 3 * 2**20 + 5
"""More bytes than one block of pinned memory has."""

CASES: dict[str, Callable[[], torch.Tensor]] = {
    "number": lambda: torch.as_tensor(3.5),
    "range": lambda: torch.arange(3),
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).T,
    "bfloat16": lambda: torch.arange(5, dtype=torch.bfloat16),
    "conjugate": lambda: torch.complex(torch.arange(3.0), torch.ones(3)).conj(),
    "strided conjugate": lambda: torch.complex(torch.arange(4.0), torch.ones(4)).conj()[::2],
    "negative": lambda: torch.complex(torch.arange(3.0), torch.ones(3)).conj().imag[::2],
    "empty": lambda: torch.zeros(0, 3),
    "expanded": lambda: torch.ones(1).expand(4),
    "large": lambda: torch.arange(LARGE, dtype=torch.uint8),
}


def values_of(t: torch.Tensor) -> np.ndarray[Any, Any]:
    t = t.detach().resolve_conj().resolve_neg().contiguous()
    if t.dtype is torch.bfloat16:
        return t.float().numpy().astype(jnp.bfloat16)
    return t.numpy()


@pytest.mark.parametrize("capsules", [False, True], ids=["exchange-api", "capsules"])
@pytest.mark.parametrize("case", CASES)
def test_host_results_are_staged(gpu: Any, case: str, capsules: bool) -> None:
    expected = values_of(CASES[case]())
    made = entry(CASES[case], f"staged {case} {capsules}", inputs=[])
    y = gpu.empty(expected.shape, expected.dtype)
    setup(force_capsules=capsules)
    try:
        gpu.call(made.name, [], [y])
    finally:
        setup()
    gpu.xla_kernel(reads=[y])  # in order, or the fixture finds the race
    np.testing.assert_array_equal(y.array, expected)
    assert gpu.count("cuStreamSynchronize") == gpu.count("cuEventSynchronize") == 0
    assert gpu.count("cuMemcpyHtoDAsync") == -(-expected.nbytes // 2**20)


def test_beside_results_of_the_device(gpu: Any) -> None:
    made = entry(lambda x: (x + 1, torch.as_tensor(2.5), x.T), "mixed", outputs=["a", "b", "c"])
    x = gpu.buffer(np.arange(6, dtype=np.float32).reshape(2, 3))
    out = [gpu.empty(shape, np.float32) for shape in ((2, 3), (), (3, 2))]
    gpu.call(made.name, [x], out)
    gpu.xla_kernel(reads=out)
    np.testing.assert_array_equal(out[0].array, x.array + 1)
    np.testing.assert_array_equal(out[1].array, np.float32(2.5))
    np.testing.assert_array_equal(out[2].array, x.array.T)


def test_a_pinned_block_is_used_again_only_when_its_copy_is_done(gpu: Any) -> None:
    size = 50_000  # no other test has blocks of that size
    made = entry(lambda: (torch.ones(size),), "again", inputs=[])
    outs = [gpu.empty((size,), np.float32) for _ in range(20)]

    def addresses() -> list[str]:
        gpu.driver.fake_reset()
        for y in outs:
            gpu.call(made.name, [], [y])
        gpu.xla_kernel(reads=outs)
        return [line.partition("from=")[2] for line in gpu.log() if "HtoD" in line]

    before = addresses()
    assert len(set(before)) == 20
    gpu.driver.fake_uncounted_synchronize(gpu.xla_streams[0])
    assert set(addresses()) <= set(before)


def test_the_host_waits_where_much_is_on_its_way(gpu: Any) -> None:
    expected = np.arange(20 * 2**20, dtype=np.uint32).astype(np.uint8)
    made = entry(lambda: (torch.from_numpy(expected),), "much", inputs=[])
    y = gpu.empty(expected.shape, expected.dtype)
    gpu.driver.fake_uncounted_synchronize(gpu.xla_streams[0])
    gpu.reset()
    gpu.call(made.name, [], [y])
    gpu.xla_kernel(reads=[y])
    np.testing.assert_array_equal(y.array, expected)
    assert gpu.count("cuEventSynchronize") >= 4  # for 16 of the 20 blocks there is memory


def test_another_device_is_refused(gpu: Any) -> None:
    made = entry(lambda x: (gpu.tensor([1.0], device=1),), "elsewhere")
    x, y = gpu.buffer(np.ones(1, np.float32)), gpu.empty((1,), np.float32)
    with pytest.raises(Exception, match=r"on cuda:1 .the arguments are on cuda:0"):
        gpu.call(made.name, [x], [y])


@pytest.mark.parametrize("name", ["cuMemHostAlloc", "cuMemcpyHtoDAsync", "cuEventRecord"])
def test_errors_of_the_driver_are_told(gpu: Any, name: str) -> None:
    size = {"cuMemHostAlloc": 70_000}.get(name, 1)  # no block of that size has been made
    made = entry(lambda: (torch.zeros(size),), f"failing {name}", inputs=[])
    y = gpu.empty((size,), np.float32)
    gpu.fail(name, code=719, after=1 if name == "cuEventRecord" else 0)
    with pytest.raises(Exception, match=r"failing .* failed with driver error 719"):
        gpu.call(made.name, [], [y])
    gpu.call(made.name, [], [y])
    np.testing.assert_array_equal(y.array, np.zeros(size))


def test_numbers_in_results_of_a_wrapped_function(gpu: Any) -> None:
    f = torch2jax(lambda x: (x.sum(), 3.0, torch.arange(3)))
    total, number, three = gpu.run(lambda x: f(x), jnp.arange(4.0))
    assert float(total) == 6.0
    assert float(number) == 3.0
    np.testing.assert_array_equal(three, jnp.arange(3))


def test_a_gradient_beside_a_number(gpu: Any) -> None:
    f = torch2jax(lambda x: ((x**2).sum(), 3.0))
    x = jnp.arange(4.0)
    (value, number), grad = gpu.run(jax.value_and_grad(f, has_aux=True), x)
    assert (float(value), float(number)) == (14.0, 3.0)
    np.testing.assert_array_equal(grad, 2 * x)


def test_a_draw_without_a_key(gpu: Any) -> None:
    f = torch2jax(lambda x: x + torch.rand_like(x))
    torch.manual_seed(0)
    a = gpu.run(lambda x: f(x), jnp.zeros(3))
    torch.manual_seed(0)
    b = gpu.run(lambda x: f(x), jnp.zeros(3))
    c = gpu.run(lambda x: f(x), jnp.zeros(3))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def many(count: int, dtype: torch.dtype, host: int = 0) -> Callable[..., Any]:
    """A function with results of a dtype, of which some are on the host."""

    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kinds = ["cpu"] * host + ["cuda:0"] * (count - host)
        return tuple(torch.full((i + 1,), i, dtype=dtype, device=d) for i, d in enumerate(kinds))

    return fn


@pytest.mark.parametrize(
    ("count", "host", "together", "alone"),
    [(3, 0, 0, 3), (4, 0, 1, 0), (9, 0, 1, 0), (9, 2, 1, 0), (5, 2, 0, 3)],
)
def test_many_results_are_copied_in_one_launch(
    gpu: Any, count: int, host: int, together: int, alone: int
) -> None:
    name = f"many {count} {host}"
    made = entry(many(count, torch.float32, host), name, outputs=[str(i) for i in range(count)])
    out = [gpu.empty((i + 1,), np.float32) for i in range(count)]
    gpu.call(made.name, [gpu.buffer(np.ones(1, np.float32))], out)
    gpu.xla_kernel(reads=out)
    for i, y in enumerate(out):
        np.testing.assert_array_equal(y.array, np.full(i + 1, i))
    assert gpu.foreach_copies == together
    assert gpu.count("cuMemcpyDtoDAsync") == alone
    assert gpu.count("cuMemcpyHtoDAsync") == host


def test_results_of_two_dtypes_are_copied_in_two_launches(gpu: Any) -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*many(4, torch.float32)(x), *many(5, torch.int32)(x))

    made = entry(fn, "two dtypes", outputs=[str(i) for i in range(9)])
    sizes = [*[(i, np.float32) for i in range(4)], *[(i, np.int32) for i in range(5)]]
    out = [gpu.empty((i + 1,), dtype) for i, dtype in sizes]
    gpu.call(made.name, [gpu.buffer(np.ones(1, np.float32))], out)
    for (i, _), y in zip(sizes, out, strict=True):
        np.testing.assert_array_equal(y.array, np.full(i + 1, i))
    assert gpu.foreach_copies == 2
    assert gpu.count("cuMemcpyDtoDAsync") == 0


def test_gradients_of_many_results_do_not_outlive_the_call(gpu: Any) -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            w = (x * 1).detach().requires_grad_()
            return tuple(w * i for i in range(6))

    made = entry(fn, "with graphs", outputs=[str(i) for i in range(6)])
    x, out = gpu.buffer(np.ones(2, np.float32)), [gpu.empty((2,), np.float32) for _ in range(6)]
    gpu.call(made.name, [x], out)
    for i, y in enumerate(out):
        np.testing.assert_array_equal(y.array, np.full(2, i))
    assert gpu.foreach_copies == 1
