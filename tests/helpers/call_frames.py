"""Call frames of XLA's FFI, made by hand: they run a handler without the runtime of its platform."""

from __future__ import annotations

import ctypes as C
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

Pointer = C.c_void_p
HEAD = [("struct_size", C.c_size_t), ("extension_start", Pointer)]

# In the order of XLA_FFI_Api, after its version and its internal part.
FUNCTIONS = (
    *("Error_Create", "Error_GetMessage", "Error_Destroy", "Handler_Register", "Stream_Get"),
    *("Type_Register", "ExecutionContext_Get", "State_Set", "State_Get", "DeviceMemory_Allocate"),
    *("DeviceMemory_Free", "ThreadPool_Schedule", "ThreadPool_NumThreads", "Future_Create"),
    *("Future_SetAvailable", "Future_SetError", "RunId_Get", "DeviceOrdinal_Get"),
)
EXECUTE = 3
STRING, SCALAR = 4, 3


def _structure(name: str, fields: Sequence[tuple[str, Any]]) -> type[C.Structure]:
    return type(name, (C.Structure,), {"_fields_": [*HEAD, *fields]})


_Version: Any = _structure("Version", [("major", C.c_int), ("minor", C.c_int)])
_Api: Any = _structure(
    "Api", [("version", _Version), ("internal", Pointer), *[(f, Pointer) for f in FUNCTIONS]]
)
_ErrorCreate: Any = _structure("ErrorCreate", [("message", C.c_char_p), ("code", C.c_int)])
_StreamGet: Any = _structure("StreamGet", [("ctx", Pointer), ("stream", Pointer)])
_RunIdGet: Any = _structure("RunIdGet", [("ctx", Pointer), ("run_id", C.c_int64)])
_OrdinalGet: Any = _structure("OrdinalGet", [("ctx", Pointer), ("ordinal", C.c_int32)])
_Buffer: Any = _structure(
    "Buffer",
    [("dtype", C.c_int), ("data", Pointer), ("rank", C.c_int64), ("dims", C.POINTER(C.c_int64))],
)
_List: Any = _structure("List", [("size", C.c_int64), ("types", Pointer), ("items", Pointer)])
_Attrs: Any = _structure(
    "Attrs", [("size", C.c_int64), ("types", Pointer), ("names", Pointer), ("items", Pointer)]
)
_Frame: Any = _structure(
    "Frame",
    [
        *(("api", Pointer), ("ctx", Pointer), ("stage", C.c_int), ("args", _List)),
        *(("rets", _List), ("attrs", _Attrs), ("future", Pointer)),
    ],
)


class _Span(C.Structure):
    _fields_ = [("data", C.c_char_p), ("size", C.c_size_t)]


class _Scalar(C.Structure):
    _fields_ = [("dtype", C.c_int), ("value", Pointer)]


class _Context(C.Structure):
    _fields_ = [("stream", Pointer), ("run_id", C.c_int64), ("ordinal", C.c_int32)]


_NUMBERS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 16, 18)
_NAMES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "bfloat16", "complex128"),
)
DTYPES = dict(zip(_NAMES, _NUMBERS, strict=True))
S64 = DTYPES["int64"]


class FrameError(Exception):
    """The handler answered with an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


_messages: list[tuple[int, str]] = []


def _create(p: int) -> int:
    args = C.cast(p, C.POINTER(_ErrorCreate)).contents
    _messages.append((args.code, args.message.decode()))
    return len(_messages)  # a handle that is not null


def _context_of(p: int, kind: Any) -> tuple[Any, Any]:
    args = C.cast(p, C.POINTER(kind)).contents
    return args, C.cast(args.ctx, C.POINTER(_Context)).contents


def _stream(p: int) -> None:
    args, context = _context_of(p, _StreamGet)
    args.stream = context.stream


def _run_id(p: int) -> None:
    args, context = _context_of(p, _RunIdGet)
    args.run_id = context.run_id


def _ordinal(p: int) -> None:
    args, context = _context_of(p, _OrdinalGet)
    args.ordinal = context.ordinal


_Callback = C.CFUNCTYPE(Pointer, Pointer)
_callbacks = {
    "Error_Create": _Callback(_create),
    "Stream_Get": _Callback(_stream),
    "RunId_Get": _Callback(_run_id),
    "DeviceOrdinal_Get": _Callback(_ordinal),
}


def _api() -> Any:
    api = _Api()
    api.struct_size = C.sizeof(_Api)
    api.version = _Version(C.sizeof(_Version), None, 0, 3)
    for name, callback in _callbacks.items():
        setattr(api, name, C.cast(callback, Pointer))
    return api


_API = _api()


def handler_in(capsule: Any) -> Callable[[int], Any]:
    """The handler that a capsule of the extension holds. It is called with the GIL, as by JAX."""
    name = C.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = C.c_char_p, [C.py_object]
    pointer = C.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = Pointer, [C.py_object, C.c_char_p]
    address = pointer(capsule, name(capsule))
    # XLA calls without the GIL where it runs a program on a thread of its own. CFUNCTYPE releases it.
    return C.CFUNCTYPE(Pointer, Pointer)(address)


@dataclass(frozen=True)
class Buffer:
    """A buffer of XLA's: memory, which is a NumPy array here."""

    array: np.ndarray[Any, Any]
    address: int

    @staticmethod
    def of(array: np.ndarray[Any, Any]) -> Buffer:
        return Buffer(array, array.ctypes.data if array.size else 0)


def _list(buffers: Sequence[Buffer], hold: list[Any]) -> Any:
    items, types = (Pointer * max(1, len(buffers)))(), (C.c_int * max(1, len(buffers)))()
    for i, buffer in enumerate(buffers):
        shape = buffer.array.shape
        dims = (C.c_int64 * max(1, len(shape)))(*shape)
        dtype = DTYPES[jnp.dtype(buffer.array.dtype).name]
        made = _Buffer(C.sizeof(_Buffer), None, dtype, buffer.address or None, len(shape), dims)
        hold += [dims, made]
        items[i], types[i] = C.addressof(made), 1
    hold += [items, types]
    return _List(C.sizeof(_List), None, len(buffers), C.addressof(types), C.addressof(items))


def _attrs(attributes: Mapping[str, str | int], hold: list[Any]) -> Any:
    size = len(attributes)
    names, items, types = (Pointer * size)(), (Pointer * size)(), (C.c_int * size)()
    for i, (name, value) in enumerate(sorted(attributes.items())):
        key = _Span(name.encode(), len(name.encode()))
        if isinstance(value, str):
            item: Any = _Span(value.encode(), len(value.encode()))
            types[i] = STRING
        else:
            number = C.create_string_buffer(struct.pack("=q", value), 8)
            item = _Scalar(S64, C.addressof(number))
            types[i] = SCALAR
            hold.append(number)
        hold += [key, item]
        names[i], items[i] = C.addressof(key), C.addressof(item)
    hold += [names, items, types]
    addresses = C.addressof(types), C.addressof(names), C.addressof(items)
    return _Attrs(C.sizeof(_Attrs), None, size, *addresses)


def call(
    handler: Callable[[int], Any],
    attributes: Mapping[str, str | int],
    operands: Sequence[Buffer],
    results: Sequence[Buffer],
    *,
    stream: int,
    run_id: int,
    ordinal: int,
) -> None:
    """Run the handler on a frame; raise what it answers."""
    hold: list[Any] = []
    context = _Context(stream, run_id, ordinal)
    frame = _Frame()
    frame.struct_size = C.sizeof(_Frame) - C.sizeof(Pointer)
    frame.api, frame.ctx, frame.stage = C.addressof(_API), C.addressof(context), EXECUTE
    frame.args, frame.rets = _list(operands, hold), _list(results, hold)
    frame.attrs = _attrs(attributes, hold)
    error = handler(C.addressof(frame))
    if error:
        raise FrameError(*_messages[error - 1])
