"""The handler and its registry under many threads: right values, typed errors, nothing kept.

`make asan` and `make tsan` run these too, on an extension that watches its own memory and locks.
"""

from __future__ import annotations

import contextlib
import gc
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from torch2jax import Size, TorchCallError, _ext, torch2jax
from torch2jax._bridge.handler import extension

X = np.arange(1, 5, dtype=np.float32)
BIG = np.full((300, 300), 1 / 300, np.float32)
TARGET = extension.TARGET
ERRORS = (jax.errors.JaxRuntimeError, ValueError)
"""As which an error of XLA comes."""


@pytest.fixture(autouse=True)
def threads_take_turns_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def together(*works: Callable[[], Any], meanwhile: Callable[[], Any] | None = None) -> None:
    """Run each in a thread of its own, and ``meanwhile`` again and again until they are done."""
    errors: list[BaseException] = []
    done = threading.Event()

    def guarded(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    def repeated() -> None:
        while meanwhile is not None and not done.wait(0.1):
            guarded(meanwhile)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    background = threading.Thread(target=repeated)
    for thread in (*threads, background):
        thread.start()
    for thread in threads:
        thread.join(600)
    done.set()
    background.join(60)
    assert not any(thread.is_alive() for thread in (*threads, background)), "a thread hangs"
    assert not errors, errors[:3]


@pytest.mark.parametrize(
    "meanwhile", [None, gc.collect, extension.set_up], ids=["", "gc", "set_up"]
)
def test_functions_come_and_go(meanwhile: Callable[[], Any] | None) -> None:
    """Wrapped, called, differentiated and dropped in four threads, beside one that all share."""
    shared = torch2jax(lambda a: (a * 3).sum())
    freed: list[weakref.ref[Any]] = []

    def work(i: int) -> None:
        for k in range(2):

            def fn(a: torch.Tensor, scale: float = 1.0 + i + 10 * k) -> torch.Tensor:
                return (a * a).sum() * scale

            scale, f = 1.0 + i + 10 * k, torch2jax(fn)
            np.testing.assert_allclose(f(X), 30 * scale)
            np.testing.assert_allclose(jax.jit(jax.grad(f))(X), 2 * X * scale)
            np.testing.assert_array_equal(jax.grad(shared)(X), [3, 3, 3, 3])
            freed.append(weakref.ref(fn))
            del f, fn

    together(*(lambda i=i: work(i) for i in range(4)), meanwhile=meanwhile)
    jax.clear_caches()
    gc.collect()
    assert [ref() for ref in freed] == [None] * 8


def test_a_name_that_is_taken_and_dropped_while_it_is_called() -> None:
    """Calls meet a function, whichever, or the error that says that there is none."""
    result = jax.ShapeDtypeStruct((4,), jnp.float32)
    name = "stress/name"
    program = jax.jit(lambda a: jax.ffi.ffi_call(TARGET, result)(a, name=name))
    met = {"right": 0, "taken": 0}
    refusals: list[str] = []
    running = threading.Event()
    running.set()

    def owner() -> None:
        for _ in range(150):
            with contextlib.suppress(ValueError):
                entry = _ext.Entry(name, lambda a: (a * 2,), "f", ["a"], ["y"], torch.float32)
                assert entry.name == name
                met["taken"] += 1
                del entry

    def caller() -> None:
        while running.is_set():
            try:
                np.testing.assert_array_equal(program(X), 2 * X)
                met["right"] += 1
            except ERRORS as error:
                refusals.append(str(error))

    def owners() -> None:
        together(owner, owner)
        running.clear()

    keep = _ext.Entry(name, lambda a: (a * 2,), "f", ["a"], ["y"], torch.float32)
    np.testing.assert_array_equal(program(X), 2 * X)
    del keep
    together(owners, caller, caller)
    assert met["taken"] > 0
    for text in refusals:
        assert "no PyTorch function is registered" in text or "has been freed" in text
    with pytest.raises(ERRORS, match="no PyTorch function is registered"):
        program(X)


def test_tensors_that_another_thread_drops() -> None:
    """Views of XLA's memory that end late, on a thread that the call knows nothing of."""
    taken: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def fn(a: torch.Tensor) -> torch.Tensor:
        y = a * 2
        taken.put(a)
        del a
        return y

    f = torch2jax(fn, output_shapes=Size([4]))
    refusals: list[str] = []

    def work() -> None:
        try:
            for _ in range(40):
                try:
                    np.testing.assert_array_equal(f(X), 2 * X)
                except TorchCallError as error:
                    refusals.append(str(error))
        finally:  # whatever else is raised, the other thread is not left waiting
            taken.put(None)

    def drop() -> None:
        ended = 0
        while ended < 3:
            ended += taken.get() is None

    together(work, work, work, drop)
    assert all("kept a tensor" in text for text in refusals)


def test_errors_and_values_on_threads_of_xla() -> None:
    """Independent calls behind large products run on XLA's pool; one in five programs raises."""
    calls = iter(range(10**9))

    def fn(a: torch.Tensor) -> torch.Tensor:
        if next(calls) % 10 == 9:
            raise ValueError("the tenth")
        return a * 2

    f = torch2jax(fn, output_shapes=Size([300, 300]))
    program = jax.jit(lambda a: f(a @ a) + f(a @ (a + 1)))
    expected = 2 * (BIG @ BIG) + 2 * (BIG @ (BIG + 1))
    right: list[bool] = []
    texts: list[str] = []

    def work() -> None:
        for _ in range(10):
            try:
                np.testing.assert_allclose(program(BIG), expected, rtol=1e-4)
                right.append(True)
            except ERRORS as error:
                texts.append(str(error))

    together(*[work] * 4, meanwhile=gc.collect)
    assert len(right) + len(texts) == 40
    assert right
    assert texts
    assert all("the tenth" in text for text in texts)


def test_shards_rows_and_gradients_at_once() -> None:
    """Eight devices, batches and gradients of one function, from three threads."""
    f = torch2jax(lambda a: torch.sin(a) * a)
    twin = lambda a: jnp.sin(a) * a  # noqa: E731
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    rows = jnp.linspace(0.0, 3.0, 32).reshape(8, 4)

    def spread(f: Any) -> Any:
        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d")))

    def gradient(f: Any) -> Any:
        return jax.jit(jax.grad(lambda a: f(a).sum()))

    uses = [spread, gradient, lambda f: jax.jit(jax.vmap(gradient(f)))]

    def work(use: Any) -> None:
        ours, theirs = use(f), use(twin)(rows)
        for _ in range(10):
            np.testing.assert_allclose(ours(rows), theirs, rtol=1e-5, atol=1e-6)

    together(*(lambda use=use: work(use) for use in uses), meanwhile=gc.collect)
