"""Only this file imports the extension, and gives the extension what it needs of PyTorch."""

from __future__ import annotations

import functools
import gc
import os
from typing import Any

import jax
import torch
import torch.utils.dlpack

from ... import _ext, _refusals
from ..._compat.torch import copy_all, exchange_api, stream_functions
from ..._conversions import lifetimes
from ..torch_side import ambient, exceptions, words
from . import memory, probing

TARGET = __name__.partition(".")[0]
"""The custom call has the package's import name, so that aliases live side by side."""

PREFETCH = f"{TARGET}_prefetch"
"""The custom call that brings a key to the host, on a GPU."""

COMPILED = f"{TARGET}_compiled"
"""The custom call of a compiled library."""

dlpack_path, dtype_routes = _ext.dlpack_path, _ext.dtype_routes
to_arrays, to_tensors = _ext.to_arrays, _ext.to_tensors
requiring_grad, in_gpu_call = _ext.requiring_grad, _ext.in_gpu_call
eager_dispatch, forget_replays = _ext.eager_dispatch, _ext.forget_replays
load_library, library_calls = _ext.load_library, _ext.library_calls
Entry, begin_shutdown = _ext.Entry, _ext.begin_shutdown

PLATFORMS = ("cpu", "cuda", "rocm")


_resolver: Any = None
"""This is ``exporting.resolve``, which knows what exported names stand for."""


def resolve_by(resolver: Any) -> None:
    """Have ``resolver(name)`` resolve unknown names; it returns "", or why it cannot."""
    global _resolver
    _resolver = resolver


def set_up(**others: Any) -> None:
    """Give the handler what it uses of PyTorch and the package; ``others`` replace parts of it."""
    hooks = {
        "ambient_clean": ambient.ambient_clean,
        "run_guarded": ambient.run_guarded,
        "describe_exception": memory.describing(exceptions.describe_exception),
        "make_room": memory.make_room,
        "collect": gc.collect,
        "resolve": lambda name: _resolver(name),
        "streams": stream_functions(),
        "copy_all": copy_all,
    }
    rocm = torch.version.hip is not None
    _ext.setup(exchange_api=exchange_api(), torch=torch, rocm=rocm, **{**hooks, **others})


set_up()
# In a forked process the handler refuses calls: what it asks before each of them raises.
os.register_at_fork(after_in_child=lambda: set_up(ambient_clean=_refusals.refuse_forked))
words.read_by(_ext.call_site, _ext.current_execution, _ext.read_words)
xla_stream = functools.partial(probing.xla_stream, _ext.xla_stream, PREFETCH)
lifetimes.order_by(xla_stream, _ext.order_release)
jax.ffi.register_ffi_target(TARGET, _ext.cpu_handler(), platform="cpu")
jax.ffi.register_ffi_target(COMPILED, _ext.compiled_cpu_handler(), platform="cpu")
for _platform in ("CUDA", "ROCM"):
    jax.ffi.register_ffi_target(PREFETCH, _ext.prefetch_handler(), platform=_platform)
    jax.ffi.register_ffi_target(TARGET, _ext.gpu_handler(), platform=_platform)
    jax.ffi.register_ffi_target(COMPILED, _ext.compiled_gpu_handler(), platform=_platform)
