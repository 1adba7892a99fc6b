"""What is timed: for a subject, a case makes a function that does a given number of calls.

How they synchronise: a loop is one compiled program, awaited at its end; every other call is
awaited with ``block_until_ready`` before the next one starts. PyTorch on a CPU is synchronous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch
from subjects.peers import Empty, JaxNumpy, Pair, Skip, Subject, Torch, array

Thunk = Callable[[], Any]

WIDTHS = (2, 4, 8, 16)
ROWS = 64
OUTPUTS = 32


class Case:
    title: str

    def make(self, subject: Subject, calls: int) -> Thunk:
        """A function that does ``calls`` calls and returns when they are done."""
        raise NotImplementedError

    def check(self, subject: Subject) -> None:
        """Raise where the subject would not be measured at what the title says."""


@dataclass(frozen=True)
class Loop(Case):
    """An identity function of float32[16] inside a compiled ``fori_loop``.

    The result feeds the next call, so that XLA can neither merge the calls nor hoist them.
    """

    width: int

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"{self.width} inputs, 1 output"

    identity = Pair(lambda *xs: xs[0], lambda *xs: xs[0])

    def _args(self) -> list[jax.Array]:
        return [array(16, seed=i) for i in range(self.width)]

    def _loop(self, f: Callable[..., jax.Array], calls: int) -> Thunk:
        first, *rest = self._args()

        @jax.jit
        def loop(first: jax.Array, rest: list[jax.Array]) -> jax.Array:
            return jax.lax.fori_loop(0, calls, lambda _, x: f(x, *rest), first)

        return lambda: loop(first, rest).block_until_ready()

    def make(self, subject: Subject, calls: int) -> Thunk:
        if isinstance(subject, JaxNumpy | Torch):
            raise Skip("no call is left to time")
        if subject.only_derivatives:
            raise Skip("nothing is differentiated")
        return self._loop(subject.wrap(self.identity, self._args()), calls)

    def check(self, subject: Subject) -> None:
        f, count = subject.counted(self.identity, self._args())
        loop = self._loop(f, 37)
        loop()
        before = count()
        loop()
        if count() - before != 37:
            raise AssertionError(f"a loop of 37 calls made {count() - before}")


def _torch_layer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.tanh(a @ b)


def _jax_layer(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.tanh(a @ b)


ADD = Pair(lambda a, b: a + b, lambda a, b: a + b)
LAYER = Pair(_torch_layer, _jax_layer)
LOSS = Pair(lambda a, b: _torch_layer(a, b).sum(), lambda a, b: _jax_layer(a, b).sum())


@dataclass(frozen=True)
class Call(Case):
    """One call from Python after the other."""

    title: str
    pair: Pair
    transform: Callable[[Callable[..., jax.Array]], Callable[..., Any]]
    native: Callable[[torch.Tensor, torch.Tensor], Any]
    """The same in PyTorch."""
    rows: int | None = None
    outputs: int | None = None
    derivative: bool = False

    def make(self, subject: Subject, calls: int) -> Thunk:
        if self.pair is ADD:
            a, b = array(16), array(16, seed=1)
        else:
            a, b = array(16), array(16, self.outputs or 16, seed=1)
        batch = a if self.rows is None else array(self.rows, 16)
        if isinstance(subject, Torch):
            return self._torch(batch, b, calls)
        if isinstance(subject, Empty) and self.pair is not ADD:
            raise Skip("it computes nothing")
        if subject.only_derivatives and not self.derivative:
            raise Skip("nothing is differentiated")
        if self.derivative and not subject.derivatives:
            raise Skip("no derivatives")
        f = self.transform(subject.wrap(self.pair, (a, b)))

        def thunk() -> None:
            for _ in range(calls):
                f(batch, b).block_until_ready()

        return thunk

    def _torch(self, a: jax.Array, b: jax.Array, calls: int) -> Thunk:
        x, y = (torch.from_numpy(jax.device_get(v).copy()) for v in (a, b))
        native = self.native

        def thunk() -> None:
            with torch.no_grad():
                for _ in range(calls):
                    native(x, y)

        return thunk


def _torch_grad(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        leaf = a.detach().requires_grad_()
        return torch.autograd.grad(LOSS.torch(leaf, b), leaf)[0]


CASES: dict[str, Case] = {
    **{f"loop{n}": Loop(n) for n in WIDTHS},
    "eager": Call("eager, a + b", ADD, lambda f: f, ADD.torch),
    "jit": Call("jit, a + b", ADD, jax.jit, ADD.torch),
    "grad": Call(
        "jit(grad), sum(tanh(a @ b))",
        LOSS,
        lambda f: jax.jit(jax.grad(f)),
        _torch_grad,
        derivative=True,
    ),
    "vmap": Call(
        f"jit(vmap) of {ROWS} rows, tanh(a @ b)",
        LAYER,
        lambda f: jax.jit(jax.vmap(f, (0, None))),
        torch.func.vmap(LAYER.torch, (0, None)),
        rows=ROWS,
    ),
    "vmap_grad": Call(
        f"jit(vmap(grad)) of {ROWS} rows, sum(tanh(a @ b))",
        LOSS,
        lambda f: jax.jit(jax.vmap(jax.grad(f), (0, None))),
        torch.func.vmap(torch.func.grad(LOSS.torch), (0, None)),
        rows=ROWS,
        derivative=True,
    ),
    "jacrev": Call(
        f"jit(jacrev) of {OUTPUTS} outputs, tanh(a @ b)",
        LAYER,
        lambda f: jax.jit(jax.jacrev(f)),
        torch.func.jacrev(LAYER.torch),
        outputs=OUTPUTS,
        derivative=True,
    ),
}
