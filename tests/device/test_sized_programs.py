"""Programs of small arrays are compiled in a quick way, those of large arrays in XLA's usual way."""

from __future__ import annotations

import numpy as np
import torch

from torch2jax import device
from torch2jax.device.tensors.sized_jit import SizedJit

device.enable()

SMALL, LARGE = np.ones(3, np.float32), np.ones((70, 70), np.float32)


def test_each_size_is_traced_once() -> None:
    traced: list[tuple[int, ...]] = []

    def double(x: np.ndarray) -> np.ndarray:
        traced.append(x.shape)
        return x + x

    jitted = SizedJit(double)
    for _ in range(3):
        for x in (SMALL, LARGE):
            np.testing.assert_array_equal(jitted(x), x + x)
    assert traced == [SMALL.shape, LARGE.shape]


def test_a_large_result_of_small_operands_is_compiled_in_the_usual_way() -> None:
    traced: list[tuple[int, ...]] = []

    def outer(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        traced.append(x.shape)
        return x[:, None] * y

    jitted = SizedJit(outer)
    x = np.arange(70.0, dtype=np.float32)
    for _ in range(3):
        np.testing.assert_array_equal(jitted(x, x), np.outer(x, x))
    assert len(traced) == 2  # the quick way finds out, and is not tried again


def test_an_expanded_view_is_no_small_operand() -> None:
    x = torch.ones(1, device="jax").expand(2**20)
    assert x.sum().item() == 2**20
    assert (x[:3] + 1).tolist() == [2, 2, 2]


def test_a_repeated_call_meets_large_memory_behind_a_small_view() -> None:
    small, large = torch.arange(10.0, device="jax"), torch.arange(5000.0, device="jax")
    for _ in range(3):
        for x in (small, small, large):
            assert (x[2:5] * 3 + 1).tolist() == [7, 10, 13]
            x[2:5].mul_(1)
    assert large.tolist() == list(range(5000))
