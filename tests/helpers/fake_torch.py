"""PyTorch's half of the fake GPUs: memory, kernels, streams and functions for CUDA.

See NOTE [The fake GPU] in ``fake_gpu.py``.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from torch2jax._bridge.handler import extension


class Managed(C.Structure):
    _fields_ = [
        *(("data", C.c_void_p), ("device_type", C.c_int32), ("device_id", C.c_int32)),
        *(("ndim", C.c_int32), ("code", C.c_uint8), ("bits", C.c_uint8), ("lanes", C.c_uint16)),
        *(("shape", C.POINTER(C.c_int64)), ("strides", C.POINTER(C.c_int64))),
        *(("byte_offset", C.c_uint64), ("context", C.c_void_p), ("deleter", C.c_void_p)),
    ]


class _ExchangeApi(C.Structure):
    _fields_ = [
        *(("major", C.c_uint32), ("minor", C.c_uint32), ("previous", C.c_void_p)),
        *(("allocator", C.c_void_p), ("from_object", C.c_void_p), ("to_object", C.c_void_p)),
        *(("tensor_from_object", C.c_void_p), ("current_work_stream", C.c_void_p)),
    ]


_pointer = C.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = C.c_void_p, [C.py_object, C.c_char_p]
_capsule = C.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = C.py_object, [C.c_void_p, C.c_char_p, C.c_void_p]

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def described(tensor: torch.Tensor) -> tuple[Any, Managed]:
    """A tensor's DLPack capsule, and what is in it."""
    capsule = torch._C._to_dlpack(tensor.detach())
    return capsule, Managed.from_address(_pointer(capsule, b"dltensor"))


def _extent(tensor: torch.Tensor) -> int:
    """How many bytes lie between the first element and the end of the last."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class ExternalStream(torch.Stream):
    """What the package and torch use of ``torch.cuda.ExternalStream``; tests count them."""

    made = 0

    def __new__(cls, stream_ptr: int, device: Any = None) -> ExternalStream:
        cls.made += 1
        index = device if isinstance(device, int) else device.index
        return super().__new__(cls, stream_id=stream_ptr, device_index=index, device_type=1)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @property
    def cuda_stream(self) -> int:
        return self.stream_id


class FakeTorch:
    """What PyTorch lacks on a machine without a GPU."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.context_managers = 0
        self.memory = {"free": 1 << 34, "total": 1 << 34, "reserved": 0, "allocated": 0}
        self.emptied = 0
        """How often PyTorch gave back what its allocator keeps."""
        self._replace_functions()
        self._replace_kernels()
        self._replace_exchange_api()

    def tensor(self, values: Any, device: int = 0, dtype: torch.dtype | None = None) -> Any:
        """A tensor on a device, written on PyTorch's current stream."""
        return self._to_device(torch.as_tensor(values, dtype=dtype), device, "fill")

    def host(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is in a tensor's memory, whatever is queued."""
        return self._alias(tensor).clone()

    @contextmanager
    def on_stream(self, stream: int, device: int = 0) -> Iterator[int]:
        """Make a stream PyTorch's current one on this thread."""
        before = self.driver.fake_torch_stream(device)
        self.driver.fake_set_torch_stream(device, C.c_void_p(stream))
        try:
            yield stream
        finally:
            self.driver.fake_set_torch_stream(device, C.c_void_p(before))

    def current_stream(self, device: int = 0) -> int:
        """PyTorch's current stream on this thread."""
        return self.driver.fake_torch_stream(device) or 0

    def kernel(
        self, reads: Sequence[torch.Tensor] = (), writes: Sequence[torch.Tensor] = ()
    ) -> int:
        """Queue a kernel on PyTorch's current stream."""
        spans = [(t.data_ptr(), _extent(t), w) for w, ts in enumerate((reads, writes)) for t in ts]
        device = (*reads, *writes)[0].device.index
        return self._queue("PyTorch's kernel", self.current_stream(device), device, spans)

    def _queue(
        self, label: str, stream: int, device: int, spans: Sequence[tuple[int, int, int]]
    ) -> int:
        operation = self.driver.fake_kernel(C.c_void_p(stream), device, label.encode())
        for address, size, write in spans:
            self.driver.fake_touch(
                C.c_size_t(operation), C.c_void_p(address), C.c_size_t(size), write
            )
        return operation

    def _to_device(self, tensor: torch.Tensor, device: int, label: str) -> torch.Tensor:
        """Copy a CPU tensor's memory into new memory of the device."""
        _capsule_of, view = described(tensor)
        size = _extent(tensor)
        managed = self.driver.fake_tensor(
            *(C.c_size_t(size), device, view.code, view.bits, view.ndim),
            *((C.c_int64 * max(1, view.ndim))(*tensor.shape),),
            *((C.c_int64 * max(1, view.ndim))(*tensor.stride()),),
        )
        out = torch._C._from_dlpack(_capsule(managed, b"dltensor", None))
        if size:
            address = Managed.from_address(managed).data
            C.memmove(address, tensor.data_ptr(), size)
            self._queue(label, self.current_stream(device), device, [(address, size, 1)])
        return out

    def _alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a CPU tensor in a device tensor's memory."""
        capsule, view = described(tensor)
        view.device_type, view.device_id = 1, 0
        return torch._C._from_dlpack(capsule)

    def _kernel(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        views = [r for r in op._schema.returns if r.alias_info and not r.alias_info.is_write]
        if views or op._schema.name == "aten::set_":
            return op.redispatch(_CPU, *args, **kwargs)  # nothing is computed: the CPU's is as good
        device = self._device_of(args, kwargs)
        flat, structure = tree_flatten((args, kwargs))
        on_cpu = [self._alias(x) if _on_device(x) else x for x in flat]
        # Outputs without elements get their size from the operator.
        outputs = {id(x) for x in _written(op, args, kwargs) if not x.numel()}
        fresh = {i: torch.empty(0, dtype=x.dtype) for i, x in enumerate(flat) if id(x) in outputs}
        on_cpu = [fresh.get(i, x) for i, x in enumerate(on_cpu)]
        on_cpu = [torch.device("cpu") if isinstance(x, torch.device) else x for x in on_cpu]
        cpu_args, cpu_kwargs = tree_unflatten(on_cpu, structure)
        written = _written(op, args, kwargs)
        with torch._C._DisableTorchDispatch():
            out = op(*cpu_args, **cpu_kwargs)
        for i, x in fresh.items():
            if x.numel():
                made = self._to_device(x, device, str(op))
                torch.ops.aten.set_.source_Tensor.redispatch(_CPU, flat[i], made)
        spans = [(x.data_ptr(), _extent(x), 0) for x in flat if _on_device(x)]
        spans += [(x.data_ptr(), _extent(x), 1) for x in written]
        self._queue(str(op), self.current_stream(device), device, spans)
        if str(op).startswith("aten::_local_scalar") or op is torch.ops.aten._local_scalar_dense:
            return out
        if any(r.alias_info is not None for r in op._schema.returns):
            return written[0] if len(op._schema.returns) == 1 else tuple(written)
        outs, structure = tree_flatten(out)
        moved = [self._to_device(x, device, str(op)) if _is_tensor(x) else x for x in outs]
        return tree_unflatten(moved, structure)

    def _device_of(self, args: Any, kwargs: Any) -> int:
        for x in tree_leaves((args, kwargs)):
            device = x.device if _on_device(x) else x if isinstance(x, torch.device) else None
            if device is not None and device.type == "cuda":
                return self.driver.fake_device() if device.index is None else device.index
        return self.driver.fake_device()

    def _copy(self, to: Any, source: Any, non_blocking: bool = False) -> Any:
        device = (to if to.is_cuda else source).device.index
        stream = self.current_stream(device)
        self.driver.fake_torch_copy(device)
        target = self._alias(to) if to.is_cuda else to
        target.copy_(self._alias(source) if source.is_cuda else source)
        spans = [(x.data_ptr(), _extent(x), w) for x, w in ((source, 0), (to, 1)) if x.is_cuda]
        self._queue("copy_", stream, device, spans)
        if to.is_cpu or (source.is_cpu and not non_blocking):
            self._synchronize(device)
        return to

    def _synchronize(self, device: int) -> None:
        self.synchronizations += 1
        before = self.driver.fake_device()
        self.driver.fake_set_device(device)
        self.driver.fake_uncounted_synchronize(C.c_void_p(self.current_stream(device)))
        self.driver.fake_set_device(before)

    synchronizations = 0
    """How often PyTorch made the host wait for a stream."""

    def _copy_all(self, to: Any, sources: Any, non_blocking: bool = False) -> None:
        device = to[0].device.index
        spans = []
        for x, y in zip(to, sources, strict=True):
            self._alias(x).copy_(self._alias(y))
            spans += [(y.data_ptr(), _extent(y), 0), (x.data_ptr(), _extent(x), 1)]
        self._queue("_foreach_copy_", self.current_stream(device), device, spans)
        self.foreach_copies += 1

    foreach_copies = 0
    """How often PyTorch copied several tensors in one launch."""

    def _record_stream(self, tensor: Any, stream: Any) -> None:
        self.driver.fake_record_stream(C.c_void_p(tensor.data_ptr()), C.c_void_p(stream.stream_id))

    def _scalar(self, tensor: Any) -> Any:
        self._queue(
            "item", self.current_stream(tensor.device.index), tensor.device.index,
            [(tensor.data_ptr(), _extent(tensor), 0)],
        )  # fmt: skip
        self._synchronize(tensor.device.index)
        return self._alias(tensor).item()

    def _replace_kernels(self) -> None:
        self._everything = torch.library.Library("_", "IMPL")
        self._everything.fallback(self._kernel, "CUDA")
        self._aten = torch.library.Library("aten", "IMPL")
        self._aten.impl("copy_", self._copy, "CUDA")
        self._aten.impl("_foreach_copy_", self._copy_all, "CUDA")
        self._aten.impl("_local_scalar_dense", self._scalar, "CUDA")
        self._aten.impl("record_stream", self._record_stream, "CUDA")

    def _replace_functions(self) -> None:
        """Give torch what it has for CUDA alone."""
        driver, cuda = self.driver, torch.cuda

        def current_device() -> int:
            return driver.fake_device()

        def set_device(device: int) -> None:
            driver.fake_set_device(device)

        def exchange(device: int) -> int:
            before = driver.fake_device()
            if device >= 0:
                driver.fake_set_device(device)
            return before

        def set_stream(stream_id: int, device_index: int, device_type: int) -> None:
            driver.fake_set_device(device_index)
            driver.fake_set_torch_stream(device_index, C.c_void_p(stream_id))

        functions = {
            "_cuda_getDevice": current_device,
            "_cuda_setDevice": set_device,
            "_cuda_exchangeDevice": exchange,
            "_cuda_maybeExchangeDevice": exchange,
            "_cuda_getCurrentStream": lambda d: (self.current_stream(d), d, 1),
            "_cuda_getCurrentRawStream": self.current_stream,
            "_cuda_setStream": set_stream,
        }
        for name, function in functions.items():
            setattr(torch._C, name, function)

        fake = self

        class Device:
            """``torch.cuda.device``, which tests count."""

            def __init__(self, device: Any) -> None:
                index = device if isinstance(device, int) else torch.device(device).index
                self.index: int = current_device() if index is None else index

            def __enter__(self) -> None:
                fake.context_managers += 1
                self.before = exchange(self.index)

            def __exit__(self, *_: object) -> None:
                driver.fake_set_device(self.before)

        class CurrentStream(Device):
            """``torch.cuda.stream``, which tests count."""

            def __init__(self, stream: ExternalStream) -> None:
                super().__init__(stream.device)
                self.stream = stream

            def __enter__(self) -> None:
                super().__enter__()
                self.inner = fake.on_stream(self.stream.stream_id, self.index)
                self.inner.__enter__()

            def __exit__(self, *error: Any) -> None:
                self.inner.__exit__(*error)
                super().__exit__(*error)

        def current_of(device: Any = None) -> ExternalStream:
            index = Device(current_device() if device is None else device).index
            return ExternalStream(self.current_stream(index), index)

        def empty_cache() -> None:
            fake.emptied += 1

        replaced = {
            "_lazy_init": lambda: None,
            "ExternalStream": ExternalStream,
            "device": Device,
            "stream": CurrentStream,
            "current_stream": current_of,
            "default_generators": (torch.Generator(), torch.Generator()),
            "mem_get_info": lambda device=None: (self.memory["free"], self.memory["total"]),
            "get_device_properties": lambda device=None: SimpleNamespace(
                total_memory=self.memory["total"]
            ),
            "memory_reserved": lambda device=None: self.memory["reserved"],
            "memory_allocated": lambda device=None: self.memory["allocated"],
            "empty_cache": empty_cache,
            "current_device": current_device,
        }
        for name, value in replaced.items():
            setattr(cuda, name, value)

    def _replace_exchange_api(self) -> None:
        """Let the API that the handler uses say what the current stream is."""
        capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
        if capsule is not None:
            theirs = _ExchangeApi.from_address(_pointer(capsule, b"dlpack_exchange_api"))
            self._api = _ExchangeApi.from_buffer_copy(theirs)
            function = C.cast(self.driver.fake_current_work_stream, C.c_void_p)
            self._api.current_work_stream = function.value
            ours = _capsule(C.addressof(self._api), b"dlpack_exchange_api", None)
            extension.exchange_api = lambda: ours
        extension.set_up()


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _on_device(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_cuda


def _written(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that an operator writes to."""
    found = []
    for i, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [x for x in tree_leaves(value) if _on_device(x)]
    return found
