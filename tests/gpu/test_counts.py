"""What a call asks of the driver: the table of docs/gpu.md, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fake_gpu import custom_calls, entry

from torch2jax import torch2jax
from torch2jax._bridge.handler import extension

ASKED = (
    *("cuEventCreate", "cuEventDestroy", "cuMemHostAlloc", "cuEventRecord", "cuStreamWaitEvent"),
    *("cuEventSynchronize", "cuMemcpyDtoDAsync", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync"),
)

Call = Callable[[], None]


def simple(gpu: Any, name: str, *results: Callable[[torch.Tensor], Any]) -> Call:
    labels = [str(i) for i in range(len(results))]
    made = entry(lambda x: tuple(r(x) for r in results), name, outputs=labels)
    x = gpu.buffer(np.ones(2, np.float32))
    out = [gpu.buffer(r(torch.ones(2)).numpy()) for r in results]
    return lambda: gpu.call(made.name, [x], out) or made.calls


def plain(gpu: Any) -> Call:
    return simple(gpu, "plain", torch.sin, torch.cos)


def many(gpu: Any) -> Call:
    return simple(gpu, "many", torch.sin, torch.cos, torch.tan, torch.exp, torch.abs)


def on_the_host(gpu: Any) -> Call:
    return simple(gpu, "on the host", torch.sin, lambda x: torch.ones(2**18 + 1))


def lowered(gpu: Any, fn: Any, *args: Any) -> list[Any]:
    traced = jax.jit(fn).trace(*args)
    program = traced.lower(lowering_platforms=("cuda",))
    gpu.held = [*getattr(gpu, "held", []), traced, program]
    return custom_calls(program)


def gradient(gpu: Any, same_program: bool) -> Call:
    f = torch2jax(lambda x: (x * x).sum())
    x = jnp.ones(3)
    keep, back = lowered(gpu, jax.value_and_grad(f), x)
    operand, one = gpu.buffer(np.ones(3, np.float32)), gpu.buffer(np.ones((), np.float32))
    value, token = gpu.empty((), np.float32), gpu.empty((4,), np.uint32)
    out = gpu.empty((3,), np.float32)

    def call() -> None:
        run_id = gpu.new_run()
        gpu.call_target(extension.TARGET, keep, [operand], [value, token], run_id=run_id)
        gpu.reset()
        run_id = run_id if same_program else gpu.new_run()
        gpu.call_target(extension.TARGET, back, [operand, token, one], [out], run_id=run_id)

    return call


def from_a_key(gpu: Any) -> Call:
    f = torch2jax(lambda x: x + torch.rand_like(x), stochastic=True)
    prefetch, draw = lowered(gpu, lambda x, k: f(x, rng=k), jnp.ones(3), jax.random.PRNGKey(0))
    x, y = gpu.buffer(np.ones(3, np.float32)), gpu.empty((3,), np.float32)
    words, same = gpu.buffer(np.array([1, 2], np.uint32)), gpu.empty((2,), np.uint32)

    def call() -> None:
        run_id = gpu.new_run()
        gpu.call_target(extension.PREFETCH, prefetch, [words], [same], run_id=run_id)
        assert counts(gpu)[:4] == [0, 0, 0, 1]
        assert counts(gpu)[6:] == [1, 0, 1]
        gpu.reset()
        gpu.call_target(extension.TARGET, draw, [x, same], [y], run_id=run_id)

    return call


def counts(gpu: Any) -> list[int]:
    return [gpu.count(name) for name in ASKED]


ROWS: dict[str, tuple[Callable[[Any], Call], list[int]]] = {
    "plain": (plain, [2, 2, 0, 2, 0, 0]),
    "many results": (many, [2, 2, 0, 0, 0, 0]),
    "on the host": (on_the_host, [4, 2, 0, 1, 2, 0]),
    "backward": (lambda gpu: gradient(gpu, True), [2, 2, 0, 1, 0, 0]),
    "backward elsewhere": (lambda gpu: gradient(gpu, False), [3, 2, 1, 1, 0, 1]),
    "from a key": (from_a_key, [2, 2, 1, 1, 0, 0]),
}


@pytest.mark.parametrize("row", ROWS)
def test_counts(gpu: Any, row: str) -> None:
    make, expected = ROWS[row]
    call = make(gpu)
    with gpu.on_stream(gpu.stream()):
        call()
        gpu.driver.fake_uncounted_synchronize(gpu.xla_streams[0])  # pinned blocks are free again
        gpu.reset()
        call()
    assert counts(gpu) == [0, 0, 0, *expected]
    assert gpu.foreach_copies == (2 if row == "many results" else 0)
