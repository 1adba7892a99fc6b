"""JAX's half of the conversions on the fake GPUs: devices, imports and exports of DLPack capsules."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import torch

from torch2jax import j2t
from torch2jax._compat import jax as compat
from torch2jax._conversions import convert, lifetimes
from torch2jax._jax2torch import transfer


@dataclass
class FakeXla:
    """What JAX's backend for GPUs was asked for. Arrays are on the CPU, with the same values."""

    gpu: Any
    devices: list[Any]
    imports: list[Any] = field(default_factory=list)
    """The memory of each tensor that was imported, with the number of its GPU and the stream."""
    exports: list[Any] = field(default_factory=list)
    """The streams that were to wait for an array."""

    def from_dlpack(self, tensor: torch.Tensor) -> Any:
        """Do what ``jax.dlpack.from_dlpack`` does."""
        self.imports.append((tensor.data_ptr(), tensor.device.index, None))
        return jax.numpy.array(self.gpu.host(tensor).numpy())

    def import_capsule(self, capsule: Any, device: Any, stream: int | None) -> Any:
        """Do what JAX does: work on ``stream`` reads the memory when what is queued there is done."""
        if stream is None:
            return compat.import_capsule(capsule, device, None)
        tensor = torch.from_dlpack(_Exported(capsule))
        number = device.local_hardware_id
        self.imports.append((tensor.data_ptr(), number, stream))
        with self.gpu.on_stream(stream, number):
            self.gpu.kernel(reads=[tensor])
        return jax.numpy.array(self.gpu.host(tensor).numpy())

    def export_capsule(self, array: Any, stream: int | None = None) -> Any:
        """Do what JAX does: ``stream``, which 1 stands for the default one of, waits for it."""
        if stream is None:
            return compat.export_capsule(array)
        self.exports.append(stream)
        with self.gpu.on_stream(0 if stream == 1 else stream):
            tensor = self.gpu.tensor(j2t(array))
        return torch._C._to_dlpack(tensor)


class _Exported:
    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


def install(monkeypatch: pytest.MonkeyPatch, gpu: Any, numbers: tuple[int, ...], cpu: bool) -> Any:
    """Give JAX the GPUs of these numbers, and a CPU or none."""
    streams = {n: gpu.stream(n) for n in numbers}
    devices = [
        SimpleNamespace(
            id=10 + n,
            local_hardware_id=n,
            platform="gpu",
            get_stream_for_external_ready_events=lambda n=n: streams[n],
        )
        for n in numbers
    ]
    real = jax.local_devices

    def local_devices(*args: Any, backend: str | None = None, **kwargs: Any) -> list[Any]:
        if backend in (None, "cuda", "gpu"):
            return devices
        if backend == "cpu" and cpu:
            return real(*args, backend=backend, **kwargs)
        raise RuntimeError(f"Unknown backend {backend}")

    xla = FakeXla(gpu, devices)
    monkeypatch.setattr(jax, "local_devices", local_devices)
    monkeypatch.setattr(convert, "default_device", lambda: devices[0])
    monkeypatch.setattr(lifetimes, "_xla_stream", gpu.xla_streams.__getitem__)
    monkeypatch.setattr(jax.dlpack, "from_dlpack", xla.from_dlpack)
    monkeypatch.setattr(transfer, "import_capsule", xla.import_capsule)
    monkeypatch.setattr(transfer, "export_capsule", xla.export_capsule)
    return xla
