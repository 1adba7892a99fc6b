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
from blocking import runs_elsewhere
from fake_gpu import custom_calls

from torch2jax import clear_tape, set_tape_budget, tape_info, torch2jax
from torch2jax._bridge.handler import extension
from torch2jax._bridge.torch_side.tape.programs import KeepGraph
from torch2jax._bridge.torch_side.tape.sites import Waiting


def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (torch.tanh(x) * w).sum()


def twin(x: Any, w: Any) -> Any:
    return (jnp.tanh(x) * w).sum()


X, W = jnp.arange(3.0), jnp.ones(3)


def check(got: Any, x: Any = X, w: Any = W) -> None:
    value, (gx, gw) = got
    expected, (ex, ew) = jax.value_and_grad(twin, (0, 1))(x, w)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gx, ex, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gw, ew, rtol=1e-5, atol=1e-6)


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
    # The handler copies the words, and PyTorch copies nothing.
    assert waited == (function == "cuMemcpyHtoDAsync")


def hits_and_misses(call: Callable[[], Any]) -> tuple[int, int]:
    before = tape_info()
    call()
    after = tape_info()
    return after.hits - before.hits, after.misses - before.misses


def waits(gpu: Any) -> int:
    """How often the host waited for the GPU."""
    return gpu.synchronizations + gpu.count("cuEventSynchronize")


def test_a_token_of_the_same_program_is_not_read(gpu: Any) -> None:
    f = torch2jax(fn)

    def program(x: Any, w: Any) -> Any:
        return jax.value_and_grad(f, (0, 1))(x, w)

    gpu.run(program, X, W)
    gpu.reset()
    assert hits_and_misses(lambda: check(gpu.run(program, X, W))) == (1, 0)
    assert waits(gpu) == gpu.count("cuMemcpyDtoHAsync") == 0
    assert not gpu.known(gpu.kernels[-1])


def test_two_calls_of_a_function_have_two_sites(gpu: Any) -> None:
    f = torch2jax(fn)

    def program(x: Any, w: Any) -> Any:
        return jax.grad(lambda x, w: f(x, w) * f(2 * x, w), (0, 1))(x, w)

    def expected(x: Any, w: Any) -> Any:
        return jax.grad(lambda x, w: twin(x, w) * twin(2 * x, w), (0, 1))(x, w)

    def call() -> None:
        for got, want in zip(gpu.run(program, X, W), expected(X, W), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5)

    call()
    gpu.reset()
    assert hits_and_misses(call) == (2, 0)
    assert waits(gpu) == 0


class Program:
    """The calls of a gradient, which a test makes in an order of its own."""

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu
        self.f = torch2jax(fn)
        traced = jax.jit(jax.value_and_grad(self.f, (0, 1))).trace(X, W)
        self.held = lowered = traced.lower(lowering_platforms=("cuda",)), traced
        self.keep_call, self.back_call = custom_calls(lowered[0])
        assert self.keep_call["site"] == self.back_call["site"] > 0

    def keep(self, x: Any, run_id: int) -> tuple[Any, Any]:
        """Run the keeping call; return its operands and its token."""
        operands = [self.gpu.buffer(np.asarray(x)), self.gpu.buffer(np.asarray(W))]
        token = self.gpu.empty((4,), np.uint32)
        value = self.gpu.empty((), np.float32)
        self._call(self.keep_call, operands, [value, token], run_id)
        return operands, token

    def back(self, kept: tuple[Any, Any], run_id: int) -> None:
        """Run the backward call on a token, and check what it gives."""
        operands, token = kept
        one = self.gpu.buffer(np.ones((), np.float32))
        out = [self.gpu.empty((3,), np.float32) for _ in range(2)]
        self._call(self.back_call, [*operands, token, one], out, run_id)
        expected = jax.grad(twin, (0, 1))(*[jnp.asarray(b.array) for b in operands])
        for got, want in zip(out, expected, strict=True):
            np.testing.assert_allclose(got.array, want, rtol=1e-5, atol=1e-6)

    def _call(self, attributes: Any, operands: Any, results: Any, run_id: int) -> None:
        self.gpu.call_target(extension.TARGET, attributes, operands, results, run_id=run_id)


def test_tokens_that_wait_together_are_read(gpu: Any) -> None:
    program = Program(gpu)
    run = gpu.new_run()
    for _ in range(2):  # as in a loop that was unrolled
        first, second = program.keep(X, run), program.keep(2 * X, run)
        gpu.reset()
        assert hits_and_misses(lambda: program.back(second, run)) == (1, 0)  # noqa: B023
        assert waits(gpu) == 1
        assert hits_and_misses(lambda: program.back(first, run)) == (1, 0)  # noqa: B023
        assert waits(gpu) == 1  # it was the only one left


def test_an_evicted_graph_still_waits(gpu: Any) -> None:
    program = Program(gpu)
    run = gpu.new_run()
    first = program.keep(X, run)
    set_tape_budget(0)
    set_tape_budget(None)
    second = program.keep(2 * X, run)
    assert hits_and_misses(lambda: program.back(first, run)) == (0, 1)
    assert hits_and_misses(lambda: program.back(second, run)) == (1, 0)


def test_after_clearing_the_tape_tokens_still_wait(gpu: Any) -> None:
    program = Program(gpu)
    run = gpu.new_run()
    first = program.keep(X, run)
    clear_tape()
    second = program.keep(2 * X, run)
    gpu.reset()
    assert hits_and_misses(lambda: program.back(first, run)) == (0, 1)
    assert hits_and_misses(lambda: program.back(second, run)) == (1, 0)
    assert waits(gpu) == 1


def test_where_too_many_wait_all_are_read() -> None:
    waiting, site = Waiting(), (1, 0, 1)
    for n in range(70_000):
        waiting.made((0, 0, 1, n), (n + 2, 0, 1))
    waiting.made((0, 0, 0, 1), site)
    assert waiting.only(site) is None


def test_other_executions_have_tokens_of_their_own(gpu: Any) -> None:
    program = Program(gpu)
    run, other = gpu.new_run(), gpu.new_run()
    first, second = program.keep(X, run), program.keep(2 * X, other)
    gpu.reset()
    assert hits_and_misses(lambda: program.back(first, run)) == (1, 0)
    assert hits_and_misses(lambda: program.back(second, other)) == (1, 0)
    assert waits(gpu) == 0


def test_without_the_number_of_an_execution_tokens_are_read(gpu: Any) -> None:
    program = Program(gpu)
    kept = program.keep(X, 0)
    gpu.reset()
    assert hits_and_misses(lambda: program.back(kept, 0)) == (1, 0)
    assert waits(gpu) == 1


def test_a_token_that_was_used_is_read_and_its_graph_kept(gpu: Any) -> None:
    program = Program(gpu)
    run = gpu.new_run()
    kept = program.keep(X, run)
    assert hits_and_misses(lambda: program.back(kept, run)) == (1, 0)
    assert hits_and_misses(lambda: program.back(kept, run)) == (0, 1)
    assert hits_and_misses(lambda: program.back(kept, run)) == (1, 0)


def test_a_call_that_keeps_no_graph_counts_too(gpu: Any, monkeypatch: Any) -> None:
    program = Program(gpu)
    run = gpu.new_run()
    with monkeypatch.context() as patch:
        patch.setattr(KeepGraph, "forward", lambda self, args: (self.base.run(*args), None))
        first = program.keep(X, run)
    second = program.keep(2 * X, run)
    program.back(first, run)
    assert hits_and_misses(lambda: program.back(second, run)) == (1, 0)


def test_a_backward_call_of_another_program_reads_without_the_gil(gpu: Any) -> None:
    f = torch2jax(fn)
    value, pull = jax.vjp(f, X, W)  # on the CPU: only the shapes matter
    keep, back = [
        custom_calls(traced.lower(lowering_platforms=("cuda",)))[0]
        for traced in (
            jax.jit(lambda x, w: jax.vjp(f, x, w)).trace(X, W),
            jax.jit(lambda pull, c: pull(c)).trace(pull, value),
        )
    ]
    assert "site" not in back
    operands = [gpu.buffer(np.asarray(X)), gpu.buffer(np.asarray(W))]
    token, out = gpu.empty((4,), np.uint32), gpu.empty((), np.float32)
    gpu.call_target(extension.TARGET, keep, operands, [out, token])
    one = gpu.buffer(np.ones((), np.float32))
    grads = [gpu.empty((3,), np.float32) for _ in range(2)]
    late = gpu.xla_kernel(reads=operands)

    def call() -> None:
        gpu.call_target(extension.TARGET, back, [*operands, token, one], grads)
        assert gpu.known(late)

    assert runs_elsewhere(gpu, call, gpu.blocked("cuEventSynchronize"))
    np.testing.assert_allclose(grads[0].array, jax.grad(twin)(X, W), rtol=1e-5, atol=1e-6)


def test_on_a_cpu_calls_have_a_name_alone() -> None:
    lowered = jax.jit(jax.value_and_grad(torch2jax(fn), (0, 1))).lower(X, W)
    assert [set(call) for call in custom_calls(lowered)] == [{"name"}] * 2
