"""Memory of one side that streams of the other still use is not written to before they are done."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fake_gpu import described, entry

from torch2jax import _ext, t2j
from torch2jax._bridge.handler import extension
from torch2jax._conversions import convert


@pytest.fixture
def known(gpu: Any) -> Any:
    """A call has run on both devices, so that XLA's streams are known."""
    if gpu is not None:
        made = entry(lambda: (torch.zeros(1),), "any call", inputs=[])
        for device in range(2):
            gpu.call(made.name, [], [gpu.empty((1,), np.float32, device)], device=device)
    return gpu


def test_the_handler_sees_xlas_stream(known: Any) -> None:
    assert [_ext.xla_stream(d) for d in range(2)] == known.xla_streams


# --- t2j -----------------------------------------------------------------------------------------


class Held:
    """What JAX has of a tensor: a reference until the array dies."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()


@pytest.mark.parametrize("device", [0, 1])
def test_memory_that_xla_reads_is_not_used_again(
    known: Any, monkeypatch: pytest.MonkeyPatch, device: int
) -> None:
    gpu = known
    monkeypatch.setattr(convert, "_bits", lambda tensor, imported: Held(tensor))
    monkeypatch.setattr(convert, "check_device", lambda tensor: None)
    with gpu.on_stream(gpu.stream(device), device) as side:
        tensor = gpu.tensor([1.0, 2.0, 3.0], device)
        address = tensor.data_ptr()
        array: Any = t2j(tensor)
        # JAX has the importing stream wait for the exporting one.
        gpu.order(side, gpu.xla_streams[device], device)
        gpu.xla_read(address, 12, device)
        frees = gpu.frees()
        del tensor, array  # XLA's work is queued, not done
        assert gpu.frees() == frees + 1
        following = gpu.tensor([4.0, 5.0, 6.0], device)  # the allocator's next block of that size
        assert following.data_ptr() != address
        gpu.driver.fake_uncounted_synchronize(ctypes.c_void_p(gpu.xla_streams[device]))
        again = gpu.tensor([7.0, 8.0, 9.0], device)
        assert again.data_ptr() == address  # but it comes back once XLA is done


# --- j2t -----------------------------------------------------------------------------------------


class Array:
    """An array of JAX's on a GPU. XLA writes to its memory as soon as nobody refers to it."""

    def __init__(self, gpu: Any, device: int) -> None:
        self.gpu, self.device = gpu, device
        self.buffer = gpu.buffer(np.arange(3, dtype=np.float32), device)
        self.released = False

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        assert stream is not None
        # The stream that will read waits for the array; 1 is PyTorch's default stream.
        self.gpu.order(self.gpu.xla_streams[self.device], 0 if stream == 1 else stream, self.device)
        capsule, view = described(torch.from_numpy(self.buffer.array))
        view.device_type, view.device_id = self.__dlpack_device__()
        theirs = Deleter(view.deleter)

        def release(managed: int) -> None:
            self.released = True
            self.gpu.xla_kernel(writes=[self.buffer], device=self.device)
            theirs(managed)

        self.callback = Deleter(release)
        view.deleter = ctypes.cast(self.callback, ctypes.c_void_p).value
        return capsule


Deleter: Callable[[Any], Any] = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@pytest.mark.parametrize("where", ["on the stream of the import", "on another stream"])
@pytest.mark.parametrize("device", [0, 1])
def test_memory_that_pytorch_reads_is_not_used_again(known: Any, device: int, where: str) -> None:
    gpu = known
    array = Array(gpu, device)
    stream, other = gpu.stream(device), gpu.stream(device)
    with gpu.on_stream(stream, device):
        tensor = convert.borrowed(array)
        gpu.reset()
        gpu.kernel(reads=[tensor])
    if where == "on another stream":
        gpu.order(stream, other, device)
    with gpu.on_stream(other if where == "on another stream" else stream, device):
        gpu.kernel(reads=[tensor])
        view = tensor[1:]
        del tensor
        assert not array.released
        del view
        assert array.released  # XLA has written, and the fixture looks for races
    assert gpu.count("cuEventRecord") == (2 if where == "on another stream" else 1)


def test_a_tensor_that_dies_where_another_device_is_current(known: Any) -> None:
    gpu = known
    array = Array(gpu, 1)
    with gpu.on_stream(gpu.stream(1), 1):
        tensor = convert.borrowed(array)
        gpu.kernel(reads=[tensor])
        gpu.driver.fake_set_device(0)
        del tensor
    assert array.released
    assert gpu.driver.fake_device() == 0


def test_a_stream_is_learnt_by_a_probe(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch2jax._bridge.handler import probing

    class Device:
        local_hardware_id = 1

    asked: list[Any] = []

    def probe(device: Any, target: str) -> None:
        asked.append((device, target))
        words = gpu.buffer(np.zeros(2, np.uint32), 1)
        out = gpu.empty((2,), np.uint32, 1)
        gpu.call_target(target, {"site": 0}, [words], [out], device=1)

    device = Device()
    monkeypatch.setattr(probing, "gpus", lambda: [device])
    monkeypatch.setattr(probing, "_probe", probe)
    gpu.driver.fake_reset()
    seen = iter([None, gpu.xla_streams[1]])
    found = probing.xla_stream(lambda index: next(seen), extension.PREFETCH, 1)
    assert found == gpu.xla_streams[1] == _ext.xla_stream(1)
    assert asked == [(device, extension.PREFETCH)]
    assert extension.xla_stream(1) == found  # the next time nobody asks
    assert len(asked) == 1
    assert probing.xla_stream(lambda index: None, extension.PREFETCH, 5) is None
