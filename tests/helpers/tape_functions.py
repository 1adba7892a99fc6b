"""Functions that the tests of the tape run, their jax.numpy twins, and how they compare."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torch2jax import tape_info
from torch2jax._bridge.torch_side.tape import programs

ERRORS = (jax.errors.JaxRuntimeError, RuntimeError, ValueError)


PACKAGE = programs.__name__.partition(".")[0]


SMALL = programs._SMALL


class Counted:
    """x -> sin(x) * x, which counts its runs: all, those that record a graph, and backward ones."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.forward = self.recorded = self.backward = 0
        self.entries: list[int] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.forward += 1
        self.recorded += torch.is_grad_enabled()
        self.entries.append(tape_info().entries)
        y = x.sin()
        if y.requires_grad:
            y.register_hook(self.count)
        return y * x

    def count(self, _: torch.Tensor) -> None:
        self.backward += 1

    @property
    def runs(self) -> tuple[int, int]:
        return self.forward, self.backward


def twin(x: jax.Array) -> jax.Array:
    return jnp.sin(x) * x


def total(f: Callable[..., Any]) -> Callable[..., jax.Array]:
    return lambda *xs: sum(jnp.real(y).sum() for y in jax.tree.leaves(f(*xs)))


def close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        wide = np.complex128 if jnp.iscomplexobj(want) else np.float64
        np.testing.assert_allclose(
            np.asarray(got).astype(wide), np.asarray(want).astype(wide), tolerance, tolerance
        )


def through_scan(f: Callable[..., Any], steps: int) -> Callable[..., Any]:
    def loss(x: jax.Array) -> jax.Array:
        out, ys = jax.lax.scan(lambda c, k: (f(c) * 0.9 + k, c.sum()), x, jnp.ones(steps))
        return (out * out).sum() + ys.sum()

    return loss


def run_python(source: str, **environment: str) -> str:
    script = textwrap.dedent(source).replace("PACKAGE", PACKAGE)
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
