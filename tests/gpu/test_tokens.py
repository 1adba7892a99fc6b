"""Tokens of the tape on GPUs: they are written and read without holding up anybody else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torch2jax import tape_info, torch2jax


def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (torch.tanh(x) * w).sum()


def twin(x: Any, w: Any) -> Any:
    return (jnp.tanh(x) * w).sum()


X, W = jnp.arange(3.0), jnp.ones(3)


def check(got: Any, x: Any = X, w: Any = W) -> None:
    value, (gx, gw) = got
    expected, (ex, ew) = jax.value_and_grad(twin, (0, 1))(x, w)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gx, ex, rtol=1e-6)
    np.testing.assert_allclose(gw, ew, rtol=1e-6)


def in_thread(call: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    return thread, errors


@pytest.mark.parametrize("function", ["cuMemcpyHtoDAsync", "fake_torch_copy"])
def test_a_token_that_waits_stops_no_other_device(gpu: Any, function: str) -> None:
    f = torch2jax(fn)

    def program(x: Any, w: Any) -> Any:
        return jax.value_and_grad(f, (0, 1))(x, w)

    # Tokens are made in blocks, so that both devices begin one here.
    gpu.run(program, X, W, device=0)
    with gpu.blocked(function, device=0):
        first, errors = in_thread(lambda: [check(gpu.run(program, X, W)) for _ in range(65)])
        waited = gpu.wait_until_blocked(3)
        second, more = in_thread(lambda: check(gpu.run(program, X, W, device=1)))
        second.join(20)
        went_on = not second.is_alive()
    first.join()
    second.join()
    assert went_on
    assert errors + more == []
    # The handler copies the words; PyTorch copies nothing.
    assert waited == (function == "cuMemcpyHtoDAsync")


def test_a_gradient_makes_the_host_wait_for_nothing_of_pytorchs(gpu: Any) -> None:
    f = torch2jax(fn)
    gpu.run(jax.value_and_grad(f, (0, 1)), X, W)
    gpu.synchronizations = 0
    before = tape_info()
    check(gpu.run(jax.value_and_grad(f, (0, 1)), X, W))
    assert tape_info().hits == before.hits + 1
    assert gpu.synchronizations == 0
