"""Keys come to the host without a wait for what was queued after their derivation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from fake_gpu import custom_calls

from torch2jax import torch2jax
from torch2jax._bridge.handler import extension
from torch2jax._bridge.torch_side import seeding

X = jnp.zeros(4)


def draws(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand_like(x)


def drawn(key: Any) -> np.ndarray[Any, Any]:
    """What PyTorch draws from a key."""
    generator = torch.Generator()
    generator.manual_seed(seeding.seed_of([int(w) for w in key]))
    return torch.rand(4, generator=generator).numpy()


def test_a_call_waits_for_its_key_alone(gpu: Any) -> None:
    f = torch2jax(draws, stochastic=True)

    def program(x: Any, words: Any) -> Any:
        return f(x, rng=words + 1)

    words = jax.random.PRNGKey(7)
    gpu.reset()
    got = gpu.run(program, X, words)
    np.testing.assert_array_equal(got, drawn(words + 1))
    assert gpu.count("cuEventSynchronize") == 1
    assert gpu.synchronizations == 0
    # What was queued between the prefetch and the call is not waited for.
    assert not gpu.known(gpu.kernels[-1])


class Program:
    """A prefetch and a call, which a test makes in an order of its own."""

    def __init__(self, gpu: Any) -> None:
        self.gpu, self.f = gpu, torch2jax(draws, stochastic=True)
        traced = jax.jit(lambda x, k: self.f(x, rng=k)).trace(X, jax.random.PRNGKey(0))
        self.held = traced.lower(lowering_platforms=("cuda",)), traced
        self.prefetch_call, self.draw_call = custom_calls(self.held[0])
        assert self.prefetch_call["site"] == self.draw_call["key"]

    def prefetch(self, seed: int, run_id: int, into: Any = None) -> Any:
        words = self.gpu.buffer(np.asarray(jax.random.PRNGKey(seed)))
        same = into or self.gpu.empty((2,), np.uint32)
        self.gpu.call_target(extension.PREFETCH, self.prefetch_call, [words], [same], run_id=run_id)
        return same

    def draw(self, words: Any, seed: int, run_id: int) -> None:
        x, y = self.gpu.buffer(np.asarray(X)), self.gpu.empty((4,), np.float32)
        self.late = self.gpu.xla_kernel(reads=[x])
        self.gpu.call_target(extension.TARGET, self.draw_call, [x, words], [y], run_id=run_id)
        np.testing.assert_array_equal(y.array, drawn(jax.random.PRNGKey(seed)))


def test_two_prefetches_of_a_site_are_read_again(gpu: Any) -> None:
    program = Program(gpu)
    run, other = gpu.new_run(), gpu.new_run()
    first = program.prefetch(1, run)
    second = program.prefetch(2, run)
    program.draw(first, 1, run)
    assert gpu.known(program.late)
    program.draw(second, 2, run)
    third = program.prefetch(3, run)
    program.draw(third, 3, run)
    assert gpu.known(program.late)  # nobody trusts the site any more in this execution
    program.draw(program.prefetch(4, other), 4, other)
    assert not gpu.known(program.late)


def test_a_prefetch_of_another_address_is_not_taken(gpu: Any) -> None:
    program = Program(gpu)
    run = gpu.new_run()
    program.prefetch(1, run)
    words = gpu.buffer(np.asarray(jax.random.PRNGKey(2)))
    program.draw(words, 2, run)
    assert gpu.known(program.late)


def test_executions_leave_nothing_behind(gpu: Any) -> None:
    program = Program(gpu)
    for seed in range(20):
        run = gpu.new_run()
        program.draw(program.prefetch(seed, run), seed, run)
        assert not gpu.known(program.late)
    assert gpu.count("cuMemHostAlloc") <= 1


def test_each_row_has_a_key_of_its_own(gpu: Any) -> None:
    f = torch2jax(draws, stochastic=True)
    words = jnp.stack([jax.random.PRNGKey(seed) for seed in range(3)])

    def program(x: Any, words: Any) -> Any:
        return jax.vmap(lambda k: f(x, rng=k))(words)

    got = gpu.run(program, X, words)
    expected = [drawn(w) for w in words]
    np.testing.assert_array_equal(got, np.stack(expected))


def test_where_too_many_wait_all_are_read(gpu: Any) -> None:
    """It is the last test of the file, because it holds for the process."""
    program = Program(gpu)
    words = gpu.buffer(np.asarray(jax.random.PRNGKey(1)))
    same = gpu.empty((2,), np.uint32)
    for _ in range(5_000):
        run = gpu.new_run()
        gpu.call_target(extension.PREFETCH, program.prefetch_call, [words], [same], run_id=run)
        gpu.driver.fake_forget()
    program.draw(same, 1, run)
    assert gpu.known(program.late)
