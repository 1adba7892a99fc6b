"""What one call asks of the driver and of PyTorch: how many events, and nothing with the GIL held."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from blocking import runs_elsewhere
from fake_gpu import ExternalStream, entry
from raw_calls import setup

EVENTS = ("cuEventCreate", "cuEventDestroy", "cuEventRecord", "cuStreamWaitEvent")


@pytest.fixture(params=[False, True], ids=["exchange-api", "capsules"])
def capsules(request: pytest.FixtureRequest) -> Any:
    """Both ways in which tensors travel."""
    setup(force_capsules=request.param)
    yield request.param
    setup()


def test_events_of_a_call(gpu: Any, capsules: bool) -> None:
    made = entry(lambda x: (x + 1, x * 2), f"events {capsules}", outputs=["a", "b"])
    x = gpu.buffer(np.arange(3, dtype=np.float32))
    out = [gpu.empty((3,), np.float32) for _ in range(2)]
    with gpu.on_stream(gpu.stream()):
        gpu.call(made.name, [x], out)  # it may create the thread's event
        gpu.reset()
        for _ in range(10):
            gpu.call(made.name, [x], out)
    assert [gpu.count(name) for name in EVENTS] == [0, 0, 20, 20]
    assert gpu.count("cuMemcpyDtoDAsync") == 20
    assert ExternalStream.made == gpu.context_managers == 0


def test_one_stream_needs_no_events(gpu: Any) -> None:
    made = entry(lambda x: (x + 1,), "on one stream")
    x, y = gpu.buffer(np.ones(3, np.float32)), gpu.empty((3,), np.float32)
    with gpu.on_stream(gpu.xla_streams[0]):
        gpu.reset()
        gpu.call(made.name, [x], [y])
    assert [gpu.count(name) for name in EVENTS] == [0, 0, 0, 0]


def test_each_thread_and_device_has_its_event(gpu: Any) -> None:
    made = entry(lambda x: (x + 1,), "on threads")
    buffers = [
        (gpu.buffer(np.ones(3, np.float32), d), gpu.empty((3,), np.float32, d)) for d in range(2)
    ]

    def calls() -> None:
        for device in (0, 1, 1, 0, 0):
            with gpu.on_stream(gpu.stream(device), device):
                gpu.call(made.name, [buffers[device][0]], [buffers[device][1]], device=device)

    calls()
    gpu.reset()
    calls()
    assert gpu.count("cuEventCreate") == 0
    for _ in range(5):
        other = threading.Thread(target=calls)
        other.start()
        other.join()
        while Path(f"/proc/self/task/{other.native_id}").exists():  # Python is done with it earlier
            time.sleep(0.001)
    assert gpu.count("cuEventCreate") <= 2  # a thread that ends leaves its events to the next
    assert gpu.count("cuEventRecord") == 6 * 10


def test_streams_and_devices_are_restored(gpu: Any, capsules: bool) -> None:
    seen = []

    def fn(x: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append((gpu.current_stream(1), torch.cuda.current_device()))
        return (x * 2,)

    made = entry(fn, f"restored {capsules}")
    x, y = gpu.buffer(np.ones(3, np.float32), 1), gpu.empty((3,), np.float32, 1)
    side = gpu.stream(1)
    with gpu.on_stream(side, 1):
        before = gpu.driver.fake_device()
        gpu.call(made.name, [x], [y], device=1)
        assert (gpu.current_stream(1), gpu.driver.fake_device()) == (side, before)
    assert seen == [(gpu.xla_streams[1], 1)]


def test_the_state_is_asked_once_per_execution(gpu: Any) -> None:
    asked = []
    setup(ambient_clean=lambda dtype: bool(asked.append(dtype)) or True)
    made = entry(lambda x: (x,), "asked")
    x, y = gpu.buffer(np.ones(3, np.float32)), gpu.empty((3,), np.float32)
    try:
        first, second = gpu.new_run(), gpu.new_run()
        for run_id in (first, first, first, second):
            gpu.call(made.name, [x], [y], run_id=run_id)
    finally:
        setup()
    assert len(asked) == 2


def test_a_call_that_is_refused_touches_no_gpu(gpu: Any) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("this process was forked")

    made = entry(lambda x: (x,), "refused")
    x, y = gpu.buffer(np.ones(3, np.float32)), gpu.empty((3,), np.float32)
    setup(ambient_clean=refuse)
    try:
        with gpu.on_stream(gpu.stream()), pytest.raises(Exception, match="process was forked"):
            gpu.call(made.name, [x], [y])
    finally:
        setup()
    assert [gpu.count(name) for name in EVENTS] == [0, 0, 0, 0]


def test_a_state_that_is_not_clean_is_made_so(gpu: Any) -> None:
    seen = []

    def fn(x: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append((torch.is_inference_mode_enabled(), gpu.current_stream()))
        return (x * 2,)

    made = entry(fn, "unclean")
    x, y = gpu.buffer(np.ones(3, np.float32)), gpu.empty((3,), np.float32)
    with torch.inference_mode():
        gpu.call(made.name, [x], [y])
    gpu.xla_kernel(reads=[y])
    np.testing.assert_array_equal(y.array, 2 * np.ones(3))
    assert seen == [(False, gpu.xla_streams[0])]


def test_an_error_of_fn_leaves_streams_in_order(gpu: Any) -> None:
    with gpu.on_stream(gpu.stream()) as side:
        held = gpu.tensor([1.0])

        def fn(x: torch.Tensor) -> tuple[torch.Tensor]:
            held.add_(x)
            raise ValueError("no")

        made = entry(fn, "raising")
        x, y = gpu.buffer(np.ones(1, np.float32)), gpu.empty((1,), np.float32)
        with pytest.raises(Exception, match="raising raised ValueError: no"):
            gpu.call(made.name, [x], [y])
        held.mul_(2)  # after what fn has queued
        assert gpu.current_stream() == side


BLOCKING: dict[str, Callable[[], Any]] = {
    "cuEventRecord": lambda: torch.zeros(2, device="cuda:0"),
    "cuStreamWaitEvent": lambda: torch.zeros(2, device="cuda:0"),
    "cuMemcpyHtoDAsync": lambda: torch.zeros(2),
    "cuMemcpyDtoDAsync": lambda: torch.zeros(2, device="cuda:0"),
}


@pytest.mark.parametrize("function", BLOCKING)
def test_python_runs_while_the_driver_waits(gpu: Any, function: str) -> None:
    made = entry(BLOCKING[function], f"waits in {function}", inputs=[])
    y = gpu.empty((2,), np.float32)
    side = gpu.stream()

    def call() -> None:
        with gpu.on_stream(side):
            gpu.call(made.name, [], [y])

    assert runs_elsewhere(gpu, call, gpu.blocked(function))
    np.testing.assert_array_equal(y.array, jnp.zeros(2))


def test_a_call_without_elements_runs_on_its_device(gpu: Any) -> None:
    """XLA says which device it is; memory without elements has no address to ask for."""
    seen: list[int | None] = []

    def fn(x: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(x.device.index)
        return (x.sin(),)

    made = entry(fn, "test_a_call_without_elements")
    for device in (1, 0, 1):
        x, y = gpu.buffer(np.empty(0, np.float32), device), gpu.empty((0,), np.float32, device)
        gpu.call(made.name, [x], [y], device=device)
    assert seen == [1, 0, 1]
    assert gpu.count("cuPointerGetAttribute") == gpu.count("cuCtxGetDevice") == 0
