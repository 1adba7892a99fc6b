"""What is compared: this package, other bridges, and the floors under all of them.

A subject turns a function (a torch one and its ``jax.numpy`` twin) into a JAX function. Subjects
are named in ``SUBJECTS`` and import what they need when they are made: no process holds all.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "benchmarks"


class Skip(Exception):
    """A subject cannot do a case; the message says why."""


@dataclass(frozen=True)
class Pair:
    """One function, for torch and for JAX."""

    torch: Callable[..., torch.Tensor]
    jax: Callable[..., jax.Array]


class Subject:
    """A way to call a torch function from JAX."""

    derivatives = True
    only_derivatives = False

    def wrap(self, pair: Pair, examples: Sequence[jax.Array]) -> Callable[..., jax.Array]:
        raise NotImplementedError

    def counted(
        self, pair: Pair, examples: Sequence[jax.Array]
    ) -> tuple[Callable[..., jax.Array], Callable[[], int]]:
        """The same, and how often the function has run."""
        calls = 0

        def counting(*args: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return pair.torch(*args)

        return self.wrap(Pair(counting, pair.jax), examples), lambda: calls


class Ours(Subject):
    def __init__(self) -> None:
        from torch2jax import torch2jax

        self._torch2jax = torch2jax

    def wrap(self, pair: Pair, examples: Sequence[jax.Array]) -> Callable[..., jax.Array]:
        return self._torch2jax(pair.torch)


class Recomputing(Ours):
    """Without the tape: the backward pass runs the forward pass again."""

    only_derivatives = True

    def wrap(self, pair: Pair, examples: Sequence[jax.Array]) -> Callable[..., jax.Array]:
        return self._torch2jax(pair.torch, residuals="recompute")


class WrapTorch2Jax(Subject):
    """``wrap_torch2jax``: builds its extension at first use, so ninja must be on the path."""

    def __init__(self) -> None:
        here = str(Path(sys.executable).parent)
        os.environ["PATH"] = os.pathsep.join([here, os.environ.get("PATH", "")])
        import wrap_torch2jax  # type: ignore[import-not-found]

        self._torch2jax = wrap_torch2jax.torch2jax

    def wrap(self, pair: Pair, examples: Sequence[jax.Array]) -> Callable[..., jax.Array]:
        return self._torch2jax(pair.torch, *(torch.from_numpy(np.array(x)) for x in examples))


def _result(pair: Pair, args: Sequence[Any]) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(pair.jax, *args)


def _tensors(arrays: Sequence[Any]) -> list[torch.Tensor]:
    # Faster than DLPack in both callbacks; the arrays are read-only views, which is what is wanted.
    return [torch.from_numpy(np.asarray(x)) for x in arrays]


class BufferCallback(Subject):
    derivatives = False

    def __init__(self) -> None:
        from jax.experimental.buffer_callback import buffer_callback

        self._buffer_callback = buffer_callback

    def wrap(self, pair: Pair, examples: Sequence[jax.Array]) -> Callable[..., jax.Array]:
        def callback(context: Any, out: Any, *args: Any) -> None:
            np.asarray(out)[...] = pair.torch(*_tensors(args)).numpy()

        return self._buffer_callback(callback, _result(pair, examples), vmap_method="sequential")


class PureCallback(Subject):
    derivatives = False

    def wrap(self, pair: Pair, examples: Sequence[jax.Array]) -> Callable[..., jax.Array]:
        def callback(*args: Any) -> np.ndarray:
            return pair.torch(*_tensors(args)).numpy()

        result = _result(pair, examples)
        return lambda *args: jax.pure_callback(callback, result, *args, vmap_method="sequential")


@functools.cache
def _empty_library() -> ctypes.CDLL:
    """``empty.cc``, compiled against the headers of the running jaxlib."""
    source = HERE / "empty.cc"
    key = hashlib.sha256(source.read_bytes() + jax.__version__.encode()).hexdigest()[:12]
    library = BUILD / f"empty-{key}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CXX", "g++"), "-O2", "-std=c++17", "-shared", "-fPIC"]
        command += ["-isystem", jax.ffi.include_dir(), str(source), "-o", str(unfinished)]
        if sys.platform == "darwin":
            command += ["-undefined", "dynamic_lookup"]
        subprocess.run(command, check=True)
        unfinished.rename(library)
    return ctypes.CDLL(str(library))


class Empty(Subject):
    """A custom call whose handler returns at once. It only says what a call costs."""

    derivatives = False
    symbol = "Empty"

    def wrap(self, pair: Pair, examples: Sequence[jax.Array]) -> Callable[..., jax.Array]:
        return self._call(self.symbol, pair, examples)

    def counted(
        self, pair: Pair, examples: Sequence[jax.Array]
    ) -> tuple[Callable[..., jax.Array], Callable[[], int]]:
        return self._call("Counted", pair, examples), _empty_library().Calls

    def _call(
        self, symbol: str, pair: Pair, examples: Sequence[jax.Array]
    ) -> Callable[..., jax.Array]:
        target = f"benchmark_{symbol}"
        handler = jax.ffi.pycapsule(getattr(_empty_library(), symbol))
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
        return jax.jit(jax.ffi.ffi_call(target, _result(pair, examples)))


class EmptyGil(Empty):
    """The same, but it takes the GIL and gives it back."""

    symbol = "EmptyGil"


class JaxNumpy(Subject):
    """The same function written in ``jax.numpy``, jitted."""

    def wrap(self, pair: Pair, examples: Sequence[jax.Array]) -> Callable[..., jax.Array]:
        return jax.jit(pair.jax)


class Torch(Subject):
    """PyTorch alone, called from Python: cases have a form of their own for it."""


SUBJECTS: dict[str, type[Subject]] = {
    "torch2jax": Ours,
    "recompute": Recomputing,
    "empty FFI call": Empty,
    "empty + GIL": EmptyGil,
    "jax.numpy": JaxNumpy,
    "PyTorch": Torch,
    "wrap_torch2jax": WrapTorch2Jax,
    "buffer_callback": BufferCallback,
    "pure_callback": PureCallback,
}

PEERS = ("wrap_torch2jax", "buffer_callback", "pure_callback")


def versions() -> dict[str, str]:
    """Of what runs here."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("jax", "jaxlib", "torch", "numpy", "wrap_torch2jax"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def array(*shape: int, seed: int = 0) -> jax.Array:
    """Standard normals, float32."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(values)
