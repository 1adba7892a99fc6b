"""The fake GPU itself: its clocks find races, and PyTorch and the handler run on it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fake_gpu import entry

from torch2jax import tape_info, torch2jax


def test_operators_compute_and_run_on_threads_of_the_device(gpu: Any) -> None:
    x = gpu.tensor([1.0, 2.0, 3.0]).requires_grad_()
    y = (torch.sin(x)[1:] * 2 + torch.ones(2, device="cuda:0")).sum()
    assert y.device == torch.device("cuda", 0)
    (grad,) = torch.autograd.grad(y, x)
    expected = torch.cat([torch.zeros(1), 2 * torch.cos(torch.tensor([2.0, 3.0]))])
    torch.testing.assert_close(gpu.host(grad), expected)
    assert y.item() == pytest.approx(float(2 * torch.sin(torch.tensor([2.0, 3.0])).sum() + 2))
    assert gpu.synchronizations == 1


@pytest.mark.races
def test_streams_race_until_an_event_orders_them(gpu: Any) -> None:
    x = gpu.tensor([1.0, 2.0])
    with gpu.on_stream(gpu.stream()):
        read = gpu.kernel(reads=[x])
    assert not gpu.before(gpu.last_write(x.data_ptr()), read)
    assert len(gpu.races()) == 1
    assert "reads what fill on" in gpu.races()[0]


def test_a_call_is_ordered_on_both_sides(gpu: Any) -> None:
    side = gpu.stream()
    with gpu.on_stream(side):
        held = gpu.tensor([1.0, 1.0, 1.0])
    keep = entry(lambda x: (x + held,), "test_a_call_is_ordered")
    with gpu.on_stream(side):
        held.mul_(2)  # queued just before the call, by PyTorch
        x, y = gpu.buffer(np.array([1, 2, 3], np.float32)), gpu.empty((3,), np.float32)
        gpu.call(keep.name, [x], [y])
        held.zero_()  # and just after it
        assert gpu.current_stream() == side
    gpu.xla_kernel(reads=[y])
    np.testing.assert_array_equal(y.array, np.array([3, 4, 5], np.float32))


def test_a_program_runs_with_its_gradient(gpu: Any) -> None:
    f = torch2jax(lambda x, w: (torch.tanh(x) * w).sum())
    x, w = jnp.arange(3.0), jnp.ones(3)
    before = tape_info()
    value, (gx, gw) = gpu.run(jax.value_and_grad(f, (0, 1)), x, w)
    after = tape_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (1, 0)

    def twin(x: Any, w: Any) -> Any:
        return (jnp.tanh(x) * w).sum()

    expected, (ex, ew) = jax.value_and_grad(twin, (0, 1))(x, w)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gx, ex, rtol=1e-6)
    np.testing.assert_allclose(gw, ew, rtol=1e-6)


def test_an_operator_gives_its_output_a_size(gpu: Any) -> None:
    x = gpu.tensor([-1.0, 2.0])
    torch.testing.assert_close(gpu.host(torch.abs(x)), torch.tensor([1.0, 2.0]))
