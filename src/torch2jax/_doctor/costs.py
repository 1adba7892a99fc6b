"""The doctor measures what a call costs here, in microseconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch

from .._torch2jax import torch2jax
from .diagnosis import Check

_LOOP = 1000


def costs() -> tuple[list[Check], dict[str, float]]:
    """Measure what adding two small arrays costs in each way of calling: (checks, figures)."""
    a = b = jnp.ones(16)
    add = torch2jax(torch.add)
    compiled, gradient = jax.jit(add), jax.jit(jax.grad(lambda a, b: add(a, b).sum()))
    native = jax.jit(jnp.add)

    @jax.jit
    def loop(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _LOOP, lambda _, x: add(x, b), a)

    figures = {
        "in a compiled loop": _microseconds(lambda: loop(a, b), 1) / _LOOP,
        "jit": _microseconds(lambda: compiled(a, b)),
        "eager": _microseconds(lambda: add(a, b)),
        "jit(grad)": _microseconds(lambda: gradient(a, b)),
        "jax.jit(jnp.add)": _microseconds(lambda: native(a, b)),
    }
    checks = [
        Check("Cost of a + b, float32[16]", name, "info", f"{cost:.3g} µs a call")
        for name, cost in figures.items()
    ]
    return checks, figures


def _microseconds(call: Callable[[], jax.Array], calls: int = 100) -> float:
    """Return the median cost of some rounds. Each call is awaited."""
    call().block_until_ready()
    rounds = []
    for _ in range(15):
        start = time.perf_counter()
        for _ in range(calls):
            call().block_until_ready()
        rounds.append((time.perf_counter() - start) / calls)
    return statistics.median(rounds) * 1e6
