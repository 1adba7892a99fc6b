"""Programs that are compiled quickly: most tests run a small one once, and compiling takes longest.

NOTE [Compiled quickly]. XLA's optimizations take most of the time of a small program: without them
it is compiled in a fifth. What the bridge, the lowerings and the device make of a function is the
same program either way, so most files leave the optimizations out. A file marked ``optimized``
compiles as users do, and so do all files where all samples were asked for, and every other process
that a test starts: the pages, the examples, the programs.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax._src.compiler as compiler

EVERYTHING = "1" in (os.environ.get("T2J_ALL_OP_SAMPLES"), os.environ.get("T2J_ALL_LOWERINGS"))

QUICK_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_use_fusion_emitters": False,
}


@functools.cache
def quick_options() -> dict[str, Any]:
    """Those of the options that this XLA knows."""

    def known(name: str, value: Any) -> bool:
        try:
            jax.jit(lambda x: x + 1, compiler_options={name: value})(1)
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in QUICK_COMPILE.items() if known(name, value)}


def quick_jit(fn: Callable[..., Any]) -> Any:
    """jax.jit that leaves the optimizations out, in every file."""
    return jax.jit(fn, compiler_options=quick_options())


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    """Compile quickly in this block, eager calls of JAX too. What a jit says itself goes first."""
    options = quick_options()
    plain = compiler.get_compile_options

    def quick(*args: Any, env_options_overrides: Any = None, **kwargs: Any) -> Any:
        overrides = options | dict(env_options_overrides or {})
        return plain(*args, env_options_overrides=overrides, **kwargs)

    compiler.get_compile_options = quick
    try:
        yield
    finally:
        compiler.get_compile_options = plain
