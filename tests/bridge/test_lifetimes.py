"""Nothing leaks: what is wrapped is freed, memory is flat, arguments do not outlive their call.

tools/soak.py does the same at full size.
"""

from __future__ import annotations

import functools
import gc
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.utils.checkpoint as checkpoints

from torch2jax import (
    DifferentiationError,
    Size,
    Torch2JaxWarning,
    TorchCallError,
    clear_tape,
    from_module,
    tape_info,
    torch2jax,
)

X = jnp.linspace(0.1, 0.9, 8)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The threads of PyTorch and XLA fight for the cores otherwise, which takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_notes() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Torch2JaxWarning)
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        yield


def resident() -> int:
    gc.collect()
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- functions are freed -------------------------------------------------------------------------


class Fn:
    """A function that can be watched, with megabytes of its own."""

    def __init__(self, mega: int = 0) -> None:
        self.ballast = np.ones(mega << 20, np.uint8)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin() * x


def key() -> Any:
    return jax.random.key(0)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(self.norm(x[:, None]), training=self.training)


def train(model: torch.nn.Module) -> Any:
    apply, variables = from_module(model)

    def loss(params: Any) -> Any:
        out, _ = apply({**variables, "params": params}, X, train=True, rng=key())
        return out.sum()

    return jax.jit(jax.grad(loss))(variables["params"])


def scanned(f: Any) -> Any:
    return lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=3)[0].sum()


def total(f: Any) -> Any:
    return lambda x: f(x).sum()


USES: dict[str, Callable[[Any], Any]] = {
    "wrap": torch2jax,
    "eager": lambda fn: torch2jax(fn)(X),
    "lower": lambda fn: torch2jax(fn).lower(X),
    "jit": lambda fn: jax.jit(torch2jax(fn))(X),
    "grad": lambda fn: jax.grad(total(torch2jax(fn)))(X),
    "vjp unused": lambda fn: jax.vjp(torch2jax(fn), X)[0],
    "vjp": lambda fn: jax.vjp(torch2jax(fn), X)[1](X),
    "vmap": lambda fn: jax.vmap(torch2jax(fn))(X[None]),
    "jvp": lambda fn: jax.jvp(torch2jax(fn), (X,), (X,)),
    "jacrev": lambda fn: jax.jacrev(torch2jax(fn))(X),
    "hessian": lambda fn: jax.hessian(total(torch2jax(fn)))(X),
    "scan": lambda fn: jax.jit(jax.grad(scanned(torch2jax(fn))))(X),
    "checkpoint": lambda fn: jax.grad(jax.checkpoint(total(torch2jax(fn))))(X),
    "depth": lambda fn: jax.grad(total(torch2jax(fn, depth=1)))(X),
    "recompute": lambda fn: jax.grad(total(torch2jax(fn, residuals="recompute")))(X),
    "stochastic": lambda fn: torch2jax(fn, stochastic=True)(X, rng=key()),
    "inplace": lambda fn: torch2jax(fn, inplace_argnums=0)(X),
    "output_shapes": lambda fn: torch2jax(fn, output_shapes=Size([8]))(X),
}


def freed(make: Callable[[], Any], use: Callable[[Any], Any]) -> bool:
    """Whether what ``make`` makes is gone after its use."""
    fn = make()
    alive = weakref.ref(fn)
    jax.block_until_ready(jax.tree.leaves(use(fn)))
    del fn
    jax.clear_caches()
    gc.collect()
    gc.collect()
    return alive() is None


@pytest.mark.parametrize("use", USES)
def test_functions_are_freed(use: str) -> None:
    clear_tape()
    assert freed(Fn, USES[use])
    assert tape_info().entries == 0


def test_modules_are_freed() -> None:
    assert freed(Model, train)
    assert freed(functools.partial(torch.nn.Linear, 8, 8), lambda m: torch2jax(m)(X))


def test_functions_are_freed_after_exceptions() -> None:
    class Raises(Fn):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    def at_trace(fn: Any) -> None:
        with pytest.raises(TorchCallError):
            torch2jax(fn)(X)

    def at_run(fn: Any) -> None:
        with pytest.raises(TorchCallError):
            torch2jax(fn, output_shapes=Size([8]))(X)

    assert freed(Raises, at_trace)
    assert freed(Raises, at_run)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_functions_are_freed_after_derivatives_beyond_depth(depth: int) -> None:
    """A rule that holds tracers would never be freed: JAX keeps traces that failed."""

    def beyond(fn: Any) -> None:
        g = total(torch2jax(fn, depth=depth))
        for _ in range(depth + 1):
            g = total(jax.grad(g))
        with pytest.raises(DifferentiationError):
            jax.jit(g)(X)

    assert freed(Fn, beyond)


def test_an_executable_keeps_its_function() -> None:
    fn = Fn()
    alive = weakref.ref(fn)
    compiled = jax.jit(torch2jax(fn)).lower(X).compile()
    del fn
    gc.collect()
    np.testing.assert_allclose(compiled(X), jnp.sin(X) * X, rtol=1e-5)
    del compiled
    jax.clear_caches()
    gc.collect()
    assert alive() is None


# --- memory is flat ------------------------------------------------------------------------------


def grows(step: Callable[[int], Any], warm: int, count: int) -> float:
    """MiB by which resident memory grows over ``count`` steps after ``warm`` ones."""
    for i in range(warm):
        jax.block_until_ready(step(i))
    before = resident()
    for i in range(count):
        jax.block_until_ready(step(warm + i))
    return (resident() - before) / 2**20


class HoldsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.x = x
        ctx.save_for_backward(y := x.exp())
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * ctx.saved_tensors[0]


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda x: x.sin() * x,
    "holds its input": HoldsInput.apply,
    "checkpoint": lambda x: checkpoints.checkpoint(torch.sin, x, use_reentrant=False),
    "old checkpoint": lambda x: checkpoints.checkpoint(torch.sin, x, use_reentrant=True),
    "draws": lambda x: torch.nn.functional.dropout(x) * x,
    "saves its result": lambda x: x.exp().tanh(),
    "torch.func": lambda x: x * torch.func.grad(lambda t: t.sin().sum())(x),
}


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_gradients_is_flat(kind: str) -> None:
    """Each graph keeps 0.5 MB at least; 200 that leak are 100 MB."""
    x = jnp.ones(1 << 17)
    run = jax.jit(jax.grad(total(torch2jax(KINDS[kind]))))
    assert grows(lambda i: run(x), 20, 200) < 32
    assert tape_info().entries == 0


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_graphs_that_are_dropped_is_flat(kind: str) -> None:
    """A graph whose backward pass never runs goes when it leaves the tape, without a cycle."""
    x = jnp.ones(1 << 17)
    run = jax.jit(lambda x: jax.vjp(torch2jax(KINDS[kind]), x))

    def step(i: int) -> Any:
        y, _ = jax.block_until_ready(run(x))
        clear_tape()
        return y

    assert grows(step, 20, 100) < 24


@pytest.mark.parametrize("where", ["forward", "backward", "trace"])
def test_memory_of_exceptions_is_flat(where: str) -> None:
    x = jnp.ones(1 << 18)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x * 2  # a local of the frame that the exception holds
        if where == "backward":
            return Fails.apply(y)
        if where == "trace" or type(x) is torch.Tensor:
            raise ValueError("no")
        return y

    f = torch2jax(fn, output_shapes=None if where == "trace" else Size(x.shape))
    call = jax.grad(total(f)) if where == "backward" else f

    def step(i: int) -> None:
        with pytest.raises((RuntimeError, ValueError, TorchCallError)):
            jax.block_until_ready(call(x))

    assert grows(step, 15, 60) < 32
    assert tape_info().entries == 0


def test_memory_of_wraps_is_flat() -> None:
    """Each function has 1 MiB; 60 that leak are 60."""

    def step(i: int) -> Any:
        y = torch2jax(Fn(1))(X)
        if i % 20 == 0:
            jax.clear_caches()
        return y

    assert grows(step, 20, 60) < 40


# --- tensors outlive no call ---------------------------------------------------------------------


def test_a_constant_is_never_changed() -> None:
    """XLA may give a call the memory of a constant itself."""
    constant = np.ones(4, np.float32)
    f = torch2jax(lambda a: a.add_(1))
    program = jax.jit(lambda b: f(jnp.asarray(constant)) + b)
    declared = torch2jax(lambda a: a.add_(1), inplace_argnums=0)
    also = jax.jit(lambda b: declared(jnp.asarray(constant))[1] + b)
    for _ in range(5):
        np.testing.assert_array_equal(program(jnp.zeros(4)), np.full(4, 2))
        np.testing.assert_array_equal(also(jnp.zeros(4)), np.full(4, 2))
    np.testing.assert_array_equal(constant, np.ones(4))


def cyclic(x: torch.Tensor) -> torch.Tensor:
    class Node:
        pass

    a, b = Node(), Node()
    a.other, b.other, a.x, b.x = b, a, x, x[1:]  # type: ignore[attr-defined]
    return x * 2


def raises_inside(x: torch.Tensor) -> torch.Tensor:
    caught = None
    try:
        y = x[1:]
        raise ValueError(y)
    except ValueError as error:
        caught = error  # a cycle: the exception holds the frame, which holds it
    return x * 2 if caught else x


def generator(x: torch.Tensor) -> torch.Tensor:
    def rows() -> Iterator[torch.Tensor]:
        yield from x

    first = rows()
    next(first)
    return x * 2


def backward_inside(x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        HoldsInput.apply(leaf).sum().backward()
        assert leaf.grad is not None
        return leaf.detach() * 2 + 0 * leaf.grad


def checkpoint_inside(x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = checkpoints.checkpoint(lambda t: t.sin() * t, leaf, use_reentrant=False)
        torch.autograd.grad(y.sum(), leaf)
    return x * 2


@pytest.mark.parametrize(
    "fn", [cyclic, raises_inside, generator, backward_inside, checkpoint_inside]
)
@pytest.mark.parametrize("mode", ["eager", "jit", "grad"])
def test_false_alarms(fn: Any, mode: str) -> None:
    f = torch2jax(fn)
    call = {"eager": f, "jit": jax.jit(f), "grad": jax.jit(jax.grad(total(f)))}[mode]
    for _ in range(40):
        y = call(X)
    if mode != "grad":
        np.testing.assert_allclose(y, 2 * X, rtol=1e-6)
