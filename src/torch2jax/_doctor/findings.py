"""The doctor finds versions, devices, the bridge and settings without running anything.

Each function here is one section of the report and yields its checks.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from .. import __version__
from .._bridge.handler.extension import PLATFORMS, TARGET, dlpack_path, dtype_routes
from .._bridge.torch_side.tape.table import default_budget, tape_info
from .._compat.private_names import NAMES, gone
from .allocators import allocators
from .diagnosis import Check

LIBRARIES = ("flax", "equinox", "optax", "orbax-checkpoint", "numpyro", "transformers")
"""Optional libraries; the doctor shows the versions of those that are installed."""


def versions() -> Iterator[Check]:
    """Yield the versions of this package and of the libraries that it works with."""

    def found(name: str, detail: str) -> Check:
        return Check("Versions", name, "info", detail)

    yield found(TARGET, __version__)
    yield found("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield found("jax", f"{jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}")
    built = torch.version.cuda or torch.version.hip
    kind = "CUDA" if torch.version.cuda else "ROCm"
    yield found("torch", f"{torch.__version__}, {f'{kind} {built}' if built else 'CPU only'}")
    yield found("numpy", np.__version__)
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield found(name, importlib.metadata.version(name))


def visible_devices() -> list[Any]:
    """Return this process's devices of the default backend, and the CPU's."""
    devices = list(jax.local_devices())
    if devices[0].platform != "cpu":
        with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave the CPU out
            devices += jax.local_devices(backend="cpu")
    return devices


def devices() -> Iterator[Check]:
    """Yield the devices that JAX sees, and whether PyTorch reaches them."""
    devices = visible_devices()
    for d in devices:
        known = d.platform in ("cpu", "gpu")
        yield Check(
            "Devices",
            f"{d.platform}:{d.id}",
            "info" if known else "warning",
            d.device_kind,
            "" if known else "PyTorch does not reach this device: move arrays to a CPU first.",
        )
    on_jax = sum(d.platform == "gpu" for d in devices)
    on_torch = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if on_jax and not on_torch:
        yield Check(
            "Devices",
            "GPUs",
            "failed",
            f"JAX has {on_jax}, PyTorch has none",
            "Install a PyTorch that is built for this GPU, or set JAX_PLATFORMS=cpu.",
        )
    elif on_torch and not on_jax:
        yield Check(
            "Devices",
            "GPUs",
            "warning",
            f"PyTorch has {on_torch}, JAX has none",
            "To compute on the GPU install JAX for it: pip install 'jax[cuda12]'.",
        )


def bridge() -> Iterator[Check]:
    """Yield how the extension passes tensors on, what it relies on, and if 64-bit types are on."""

    def found(name: str, detail: str) -> Check:
        return Check("Bridge", name, "ok", detail)

    yield found("custom call", f"{TARGET!r}, registered for {', '.join(PLATFORMS)}")
    path = dlpack_path()
    ways = {
        "c-exchange-api": "PyTorch's C exchange API, no Python object per tensor",
        "capsules": "capsules; PyTorch 2.10 or later has a faster way",
    }
    yield found("DLPack", ways.get(path, path))
    detours = sorted(name for name, route in dtype_routes().items() if name != route)
    if detours:
        yield Check("Bridge", "dtypes", "info", f"as bytes, reinterpreted: {', '.join(detours)}")
    lacking = gone()
    if lacking:
        yield Check(
            "Bridge",
            "private names",
            "warning",
            "gone: "
            + "; ".join(
                f"{name} ({NAMES[name][0].lower()}{NAMES[name][1:-1]})" for name in lacking
            ),
            "Install a PyTorch and a JAX of the README's table of versions.",
        )
    else:
        yield found("private names", f"all {len(NAMES)} of PyTorch and JAX are there")
    x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    yield Check(
        "Bridge",
        "x64",
        "info",
        "on" if x64 else "off, as JAX starts: float64 results become float32, int64 int32",
    )


def memory() -> Iterator[Check]:
    """Yield settings that cost memory or time: allocators, the tape's budget, and switches."""
    gpus = [d for d in visible_devices() if d.platform == "gpu"]
    if gpus:
        yield from allocators(gpus[0])
    yield from _memory_of_host()
    yield from _switches(bool(gpus))


def _memory_of_host() -> Iterator[Check]:
    given = tape_info().budget
    budget = default_budget(torch.device("cpu")) if given is None else given
    limit = memory_limit()
    detail = f"up to {budget / 2**30:.1f} GiB of activations on the host"
    if limit is not None:
        detail += f"; the process may use {limit / 2**30:.1f} GiB"
    tight = limit is not None and budget > limit // 2
    yield Check(
        "Memory",
        "tape",
        "warning" if tight else "info",
        detail,
        f"Set {TARGET.upper()}_TAPE_BYTES, or call set_tape_budget()." if tight else "",
    )


def memory_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes to which a container limits this process, or None."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limit = int((root / name).read_text(encoding="ascii"))
            return limit if limit < 2**60 else None
    return None


def _switches(gpu: bool) -> Iterator[Check]:
    """Yield debugging switches that somebody left on, and too many threads."""
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        yield Check(
            "Memory",
            "jit",
            "warning",
            "jax_disable_jit is on: loops run in Python, one call at a time",
            "Unset JAX_DISABLE_JIT.",
        )
    slow = {"CUDA_LAUNCH_BLOCKING": "every kernel is awaited"}
    slow["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "PyTorch asks the driver for every tensor"
    for name, effect in slow.items():
        if gpu and os.environ.get(name, "0") != "0":
            yield Check("Memory", name, "warning", f"is set: {effect}", "Unset it.")
    threads, processors = torch.get_num_threads(), _processors()
    if threads > processors:
        yield Check(
            "Memory",
            "threads",
            "warning",
            f"PyTorch computes with {threads} threads on {processors} processors",
            f"Call torch.set_num_threads({processors}), or set OMP_NUM_THREADS.",
        )


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):  # macOS has none
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
