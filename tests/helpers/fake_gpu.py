"""Two GPUs for machines without any: a fake driver, and kernels of PyTorch's that run on the CPU.

NOTE [The fake GPU]. The extension's handler for GPUs runs from end to end. XLA's half of a call is
a frame made by hand (``call_frames.py``). The driver is ``tests/gpu/fake_driver.cc``, which knows
which work has to be done before which other work. PyTorch's half is real, but for three things that
a CPU build lacks: a device guard (``fake_guard.cc``), functions of ``torch._C`` for streams and
devices, and kernels (``fake_torch.py``). All operators without a composite kernel come to
``FakeTorch._kernel``, which computes on the CPU, in the same memory, and tells the driver what was
read and written on which stream.
"""

from __future__ import annotations

import ctypes as C
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import call_frames
import jax
import jax.numpy as jnp
import numpy as np
import torch
from call_frames import Buffer
from fake_torch import ExternalStream, FakeTorch, described

from torch2jax import _ext
from torch2jax._bridge.handler import entries, extension
from torch2jax._bridge.jax_side.primitive import torch_call_p


class FakeGpu(FakeTorch):
    """The fake GPUs of this process."""

    def __init__(self, library: Path) -> None:
        driver = C.CDLL(str(library))
        for name in ("fake_torch_stream", "fake_new_stream", "fake_allocate", "fake_tensor"):
            getattr(driver, name).restype = C.c_void_p
        for name in ("fake_log", "fake_races"):
            getattr(driver, name).restype = C.c_char_p
        driver.fake_kernel.restype = driver.fake_frees.restype = C.c_size_t
        driver.fake_last.restype = C.c_long
        super().__init__(driver)
        self._handlers = {
            extension.TARGET: call_frames.handler_in(_ext.gpu_handler()),
            extension.PREFETCH: call_frames.handler_in(_ext.prefetch_handler()),
        }
        self._runs = itertools.count(1)
        self._foreign: list[Any] = []
        self._programs: list[Any] = []
        self.kernels: list[int] = []
        """Work of XLA's that ``run`` queued just before each call."""
        self.xla_streams = [self.stream(d) for d in range(2)]

    # --- the driver ------------------------------------------------------------------------------

    def stream(self, device: int = 0) -> int:
        """Make a stream."""
        return self.driver.fake_new_stream(device)

    def reset(self) -> None:
        """Forget what was counted, logged and found, and what fails or waits."""
        self.driver.fake_reset()
        ExternalStream.made = self.context_managers = 0

    def count(self, name: str) -> int:
        """How often the extension has called a function of the driver."""
        return self.driver.fake_count(name.encode())

    def log(self) -> list[str]:
        """The calls of the extension, in order."""
        return self.driver.fake_log().decode().splitlines()

    def races(self) -> list[str]:
        """Operations on the same bytes that nothing orders."""
        return self.driver.fake_races().decode().splitlines()

    def fail(self, name: str, code: int = 1, after: int = 0) -> None:
        """Let a function of the driver fail once, after so many calls."""
        self.driver.fake_fail(name.encode(), after, code)

    @contextmanager
    def blocked(self, name: str, device: int = 0) -> Iterator[None]:
        """Let calls of a function of the driver wait, on a device."""
        self.driver.fake_block(name.encode(), device, 1)
        try:
            yield
        finally:
            self.driver.fake_block(name.encode(), device, 0)

    def wait_until_blocked(self, seconds: float = 20) -> bool:
        """Wait until a thread waits in the driver."""
        return bool(self.driver.fake_wait_until_blocked(int(seconds * 1000)))

    def before(self, a: int, b: int) -> bool:
        """Whether an operation is done before another starts."""
        return bool(self.driver.fake_before(C.c_size_t(a), C.c_size_t(b)))

    def last_write(self, address: int) -> int:
        """The operation that wrote a byte last."""
        return self.driver.fake_last(C.c_void_p(address), 1)

    def last_read(self, address: int) -> int:
        """The operation that read a byte last."""
        return self.driver.fake_last(C.c_void_p(address), 0)

    def known(self, operation: int) -> bool:
        """Whether this thread of the host has waited until an operation was done."""
        return bool(self.driver.fake_known(C.c_size_t(operation)))

    def frees(self) -> int:
        """How many blocks PyTorch's allocator got back."""
        return self.driver.fake_frees()

    # --- XLA -------------------------------------------------------------------------------------

    def new_run(self) -> int:
        """The number of another execution of a program; they rise."""
        return next(self._runs)

    def buffer(self, values: Any, device: int = 0) -> Buffer:
        """Memory of XLA's on a device, with values that its stream has written."""
        array = np.array(values, order="C")
        buffer = Buffer.of(array)
        if array.nbytes:
            self.driver.fake_known_memory(C.c_void_p(buffer.address), array.nbytes, device)
            self._foreign.append(array)  # the driver knows it for as long as the process lives
            self.xla_kernel(writes=[buffer], device=device)
        return buffer

    def empty(self, shape: Sequence[int], dtype: Any, device: int = 0) -> Buffer:
        """Memory of XLA's for a result."""
        return self.buffer(np.zeros(shape, dtype), device)

    def xla_kernel(
        self, reads: Sequence[Buffer] = (), writes: Sequence[Buffer] = (), device: int = 0
    ) -> int:
        """Queue a kernel on XLA's stream."""
        stream = self.xla_streams[device]
        spans = [(b.address, b.array.nbytes, w) for w, bs in enumerate((reads, writes)) for b in bs]
        return self._queue("XLA's kernel", stream, device, spans)

    def xla_read(self, address: int, size: int, device: int = 0) -> int:
        """Queue a kernel on XLA's stream that reads memory of PyTorch's."""
        spans = [(address, size, 0)]
        return self._queue("XLA's kernel", self.xla_streams[device], device, spans)

    def order(self, earlier: int, later: int, device: int = 0) -> None:
        """Let a stream wait for another, as JAX or a user does."""
        self.driver.fake_order(C.c_void_p(earlier), C.c_void_p(later), device)

    def call(
        self,
        name: str,
        operands: Sequence[Buffer] = (),
        results: Sequence[Buffer] = (),
        attributes: Mapping[str, str | int] = MappingProxyType({}),
        *,
        device: int = 0,
        run_id: int | None = None,
        stream: int | None = None,
    ) -> None:
        """Run the handler as XLA does in an execution of a program on a device."""
        given = {"name": name, **attributes}
        self.call_target(
            extension.TARGET, given, operands, results, device=device, run_id=run_id, stream=stream
        )

    def call_target(
        self,
        target: str,
        attributes: Mapping[str, str | int],
        operands: Sequence[Buffer],
        results: Sequence[Buffer],
        *,
        device: int = 0,
        run_id: int | None = None,
        stream: int | None = None,
    ) -> None:
        """Run one of the package's handlers."""
        before = self.driver.fake_device()
        self.driver.fake_set_device(device)
        try:
            call_frames.call(
                self._handlers[target],
                attributes,
                operands,
                results,
                stream=self.xla_streams[device] if stream is None else stream,
                run_id=self.new_run() if run_id is None else run_id,
                ordinal=device,
            )
        finally:
            self.driver.fake_set_device(before)

    def run(self, fn: Callable[..., Any], *args: Any, device: int = 0) -> Any:
        """Run a JAX function, compiled for a GPU, with its custom calls on the device.

        What else is in the program JAX computes on the CPU.
        """
        leaves, _ = jax.tree_util.tree_flatten(args)
        traced = jax.jit(fn).trace(*args)
        lowered = traced.lower(lowering_platforms=("cuda",))
        calls = iter(custom_calls(lowered))
        self.kernels = []
        self._programs.append((lowered, traced))  # they hold the callees
        run_id = self.new_run()
        buffers = [self.buffer(np.asarray(x), device) for x in leaves]
        jaxpr = traced.jaxpr
        consts = [self.buffer(np.asarray(x), device) for x in jaxpr.consts]
        out = self._evaluate(jaxpr.jaxpr, consts, buffers, calls, device, run_id)
        structure = jax.tree_util.tree_structure(traced.out_info)
        return jax.tree_util.tree_unflatten(structure, [jnp.array(b.array) for b in out])

    def _evaluate(
        self,
        jaxpr: Any,
        consts: Sequence[Buffer],
        args: Sequence[Buffer],
        calls: Iterator[dict[str, str | int]],
        device: int,
        run_id: int,
    ) -> list[Buffer]:
        values: dict[Any, Buffer] = {}
        values.update(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Buffer:
            if hasattr(atom, "val"):
                return self.buffer(np.asarray(atom.val, atom.aval.dtype), device)
            return values[atom]

        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if eqn.primitive is torch_call_p:
                out = [self.empty(v.aval.shape, v.aval.dtype, device) for v in eqn.outvars]
                attributes = next(calls)
                if "name" not in attributes:  # the prefetch of the call's key
                    at = eqn.params["callee"].options.rng
                    key = self.empty(eqn.invars[at].aval.shape, np.uint32, device)
                    self.call_target(
                        extension.PREFETCH, attributes, [operands[at]], [key],
                        device=device, run_id=run_id,
                    )  # fmt: skip
                    operands[at] = key
                    attributes = next(calls)
                # Work that was queued before the call, and for which the host need not wait.
                self.kernels.append(self.xla_kernel(reads=operands, device=device))
                self.call_target(
                    extension.TARGET, attributes, operands, out, device=device, run_id=run_id
                )
            elif inner is not None and "num_consts" not in eqn.params:
                closed = inner if hasattr(inner, "consts") else inner.jaxpr
                held = [self.buffer(np.asarray(c), device) for c in getattr(closed, "consts", ())]
                body = getattr(closed, "jaxpr", closed)
                out = self._evaluate(body, held, operands, calls, device, run_id)
            else:
                arrays = [jnp.array(b.array) for b in operands]
                got = eqn.primitive.bind(*arrays, **eqn.params)
                got = got if eqn.primitive.multiple_results else [got]
                self.xla_kernel(reads=operands, device=device)
                out = [self.buffer(np.asarray(x), device) for x in got]
            values.update(zip(eqn.outvars, out, strict=True))
        return [read(v) for v in jaxpr.outvars]


def custom_calls(lowered: Any) -> list[dict[str, str | int]]:
    """The attributes of the package's custom calls in a lowered program, in order."""
    found: list[dict[str, str | int]] = []

    def visit(operation: Any) -> None:
        for region in operation.regions:
            for block in region:
                for inner in block:
                    visit(inner.operation)
        if operation.name != "stablehlo.custom_call":
            return
        attributes = operation.attributes
        if attributes["call_target_name"].value in (extension.TARGET, extension.PREFETCH):
            config = attributes["mhlo.backend_config"]
            found.append({item.name: item.attr.value for item in config})

    visit(lowered.compiler_ir().operation)
    return found


def entry(run: Callable[..., Any], name: str, **changes: Any) -> Any:
    """Register a function of tensors under a name."""
    given = {"name": name, "run": run, "label": name, "inputs": ["x"], "outputs": ["y"]}
    return extension.Entry(**{**given, "default_dtype": torch.float32, **changes})


__all__ = ["Buffer", "ExternalStream", "FakeGpu", "custom_calls", "described", "entries", "entry"]
_lock = threading.Lock()
_gpu: FakeGpu | None = None


def install(library: Path) -> FakeGpu:
    """Put the fake GPUs into this process, for good. The driver has been loaded before torch."""
    global _gpu
    with _lock:
        if _gpu is None:
            _gpu = FakeGpu(library)
    return _gpu
