"""Backward passes on threads of PyTorch's own.

PyTorch runs the backward pass of a GPU on a thread of its own. On a CPU it takes such a thread for
a backward pass inside sixty others, and treats it alike: these tests go that deep.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from jax.sharding import AxisType

from torch2jax import Torch2JaxError, jax2torch, t2j
from torch2jax._refusals import on_one_of_several

DEPTH = 64


def pulled_back_deeply(pull: Callable[[torch.Tensor], Any]) -> threading.Thread:
    """Call ``pull`` in a backward pass on another thread, and return that thread."""
    threads: list[threading.Thread] = []

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, depth: int) -> torch.Tensor:
            ctx.depth = depth
            return x * 1

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> Any:
            if ctx.depth == 0:
                threads.append(threading.current_thread())
                pull(g)
                return g, None
            with torch.enable_grad():
                inner = g.detach().requires_grad_()
                y = Nested.apply(inner, ctx.depth - 1).sum()
            return torch.autograd.grad(y, inner)[0], None

    x = torch.ones(3, requires_grad=True)
    Nested.apply(x, DEPTH).sum().backward()
    (thread,) = threads
    assert thread is not threading.current_thread()
    return thread


def test_jax_is_refused_in_backward_passes_too() -> None:
    """There it would deadlock as in the forward pass: the devices wait for each other."""
    refused: list[str] = []

    def pull(g: torch.Tensor) -> None:
        for call in (t2j, jax2torch(jnp.sin)):
            try:
                call(g)
            except Torch2JaxError as error:
                refused.append(str(error))

    on_one_of_several(pulled_back_deeply)(pull)
    assert len(refused) == 2
    assert all("runs on several devices at once" in text for text in refused)
    pulled_back_deeply(pull)  # the thread is the same one, and the flag is gone
    assert len(refused) == 2


def test_flags_hold_where_calls_are_nested() -> None:
    def refuses() -> bool:
        try:
            t2j(torch.ones(3))
        except Torch2JaxError:
            return True
        return False

    assert not refuses()
    assert on_one_of_several(lambda: (on_one_of_several(refuses)(), refuses()))() == (True, True)
    with pytest.raises(ZeroDivisionError):
        on_one_of_several(lambda: 1 // 0)()
    assert not refuses()


SETTINGS = {
    "matmul precision": lambda: jax.default_matmul_precision("highest"),
    "mesh": lambda: jax.set_mesh(jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))),
}


def seen() -> tuple[Any, ...]:
    """What a trace is told, as JAX says itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.config.jax_default_matmul_precision, mesh.axis_names


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "torch.compile"])
def test_backward_passes_have_the_settings_of_the_call(compiled: bool) -> None:
    traced: list[Any] = []

    @jax.custom_vjp
    def fn(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    def backward(x: jax.Array, c: jax.Array) -> tuple[jax.Array]:
        traced.append(seen())
        return (jnp.cos(x) * c,)

    fn.defvjp(lambda x: (jnp.sin(x), x), backward)
    f: Any = jax2torch(fn)
    if compiled:
        torch._dynamo.reset()
        f = torch.compile(f, backend="aot_eager", fullgraph=True)
    x = torch.ones(3, requires_grad=True)
    with jax.default_matmul_precision("highest"):
        expected = seen()
        y = f(x)

        def pull(g: torch.Tensor) -> None:
            y.backward(g)

        assert seen() == expected
        pulled_back_deeply(pull)
    torch.testing.assert_close(x.grad, torch.cos(x.detach()))
    assert set(traced) == {expected}, traced
    assert seen() != expected


@pytest.mark.parametrize("setting", SETTINGS)
def test_second_derivatives_have_the_settings_of_the_call(setting: str) -> None:
    traced: list[Any] = []

    def fn(x: jax.Array) -> jax.Array:
        traced.append(seen())
        return jnp.sin(x) * x

    x = torch.ones(3, requires_grad=True)
    with SETTINGS[setting]():
        expected = seen()
        y = jax2torch(fn)(x).sum()
        found: list[torch.Tensor] = []

        def pull(g: torch.Tensor) -> None:
            with torch.enable_grad():
                (first,) = torch.autograd.grad(y, x, create_graph=True)
                found.extend(torch.autograd.grad(first.sum(), x))

        pulled_back_deeply(pull)
    ones = torch.ones(3)
    torch.testing.assert_close(found[0], 2 * torch.cos(ones) - ones * torch.sin(ones))
    assert len(traced) > 1
    assert set(traced) == {expected}, traced
