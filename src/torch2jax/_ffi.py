"""The handler's side of a callable: the only file that imports the extension."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import threading
import time
from collections import Counter
from typing import Any

import jax
import torch
import torch.utils.dlpack

from . import _ext, _lease, _state
from ._callable import Callable
from ._norms import in_parts
from ._torch_compat import exchange_api

TARGET = __name__.partition(".")[0]
"""Name of the custom call: the package's import name, so that aliases live side by side."""

dlpack_path, dtype_routes = _ext.dlpack_path, _ext.dtype_routes
to_arrays, to_tensors = _ext.to_arrays, _ext.to_tensors
requiring_grad = _ext.requiring_grad
eager_dispatch, forget_plans = _ext.eager_dispatch, _ext.forget_plans

PLATFORMS = ("cpu", "cuda", "rocm")

_resolver: Any = None
"""``_export.resolve``, which knows what exported names stand for."""
_names: Counter[str] = Counter()
_lock = threading.RLock()


def resolve_by(resolver: Any) -> None:
    """Have unknown names resolved by ``resolver(name) -> str``, "" or why it cannot."""
    global _resolver
    _resolver = resolver


def register(callable: Callable, several_devices: bool = False) -> Any:
    """The callable's entry in the handler's table; made, and named, when it is first lowered.

    It has another one for programs on several devices.
    """
    with _lock:
        if callable.registrations[several_devices] is None:
            name = name_of(callable) + SEVERAL * several_devices
            callable.registrations[several_devices] = entry_of(callable, name, several_devices)
        return callable.registrations[several_devices]


SEVERAL = "/several"
"""Ends the name of a call in a program on several devices."""


def entry_of(callable: Callable, name: str, several_devices: bool) -> Any:
    """An entry of the handler's table; withdrawn when nothing refers to it."""
    options, base = callable.options, callable.parent is None
    run, collect = runnable(callable)
    return _ext.Entry(
        name=name,
        run=_state.on_one_of_several(run) if several_devices else run,
        collect=collect,
        label=options.label + callable.path,
        inputs=list(callable.inputs),
        outputs=list(callable.outputs),
        default_dtype=options.default_dtype,
        pass_outputs=base and options.pass_outputs,
        inplace=[i for i, _ in options.aliases] if base else [],
    )


def runnable(callable: Callable) -> tuple[Any, Any]:
    """``run``, and what makes a tuple of other results than one; None where there are none."""
    program = callable.program
    run, collect = getattr(program, "bare", None) or (in_parts(program, program.run), None)
    return _lease.scoped(run) if callable.options.borrows else run, collect


def name_of(callable: Callable) -> str:
    """The callable's name: ``module.qualname``, a counter, and how it is derived.

    The counter of a root is given when it or anything derived from it is first lowered, so equal
    programs have equal names in every process.
    """
    if callable.parent is not None:
        return name_of(callable.parent) + callable.suffix
    name = callable.memo.get("name")
    if name is None:
        root = callable.options.name
        count = _names[root]
        _names[root] += 1
        name = root if callable.options.named and count == 0 else f"{root}#{count}"
        callable.memo["name"] = name
    return name


def set_up(**others: Any) -> None:
    """Give the handler what it uses of PyTorch and of the package, or others of it."""
    hooks = {
        "ambient_clean": _state.ambient_clean,
        "run_guarded": _state.run_guarded,
        "describe_exception": _state.describe_exception,
        "collect": lambda: gc.collect(1),
        "resolve": lambda name: _resolver(name),
        "run_on_stream": _state.run_on_stream,
        "current_stream": _state.current_stream,
    }
    rocm = torch.version.hip is not None
    _ext.setup(exchange_api=exchange_api(), torch=torch, rocm=rocm, **{**hooks, **others})


set_up()
# In a forked process the handler refuses: what it asks before a call raises.
os.register_at_fork(
    after_in_child=lambda: set_up(
        ambient_clean=_state.refuse_forked, run_on_stream=_state.refuse_forked
    )
)
jax.ffi.register_ffi_target(TARGET, _ext.cpu_handler(), platform="cpu")
for _platform in ("CUDA", "ROCM"):
    jax.ffi.register_ffi_target(TARGET, _ext.gpu_handler(), platform=_platform)


def _shut_down() -> None:
    """Let what was dispatched end, 5 s at most, then refuse calls.

    A program that is still running while the interpreter goes has ended some processes by abort.
    """
    deadline = time.monotonic() + 5
    if _names:  # something was lowered, so JAX has a backend
        with contextlib.suppress(Exception):
            for array in jax.live_arrays():
                while not (array.is_deleted() or array.is_ready()):
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.001)
    _ext.begin_shutdown()


atexit.register(_shut_down)
