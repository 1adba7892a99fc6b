"""fn sees one torch state whatever its caller has switched on, and the caller finds it as it was."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest
import torch
from harness import default_dtype
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch2jax import torch2jax

X = np.ones((3, 3), np.float32)


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


STATES: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "default_dtype": lambda: default_dtype(torch.float64),
    "device": lambda: torch.device("meta"),
    "function_mode": Functions,
    "dispatch_mode": Dispatches,
}


def state() -> dict[str, Any]:
    """What torch has switched on in this thread."""
    return {
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "inference": torch.is_inference_mode_enabled(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "functions": torch._C._len_torch_function_stack(),
        "dispatches": torch._C._len_torch_dispatch_stack(),
    }


def plain_state() -> dict[str, Any]:
    with torch.no_grad():
        return state()


def observer() -> tuple[list[dict[str, Any]], Callable[[torch.Tensor], torch.Tensor]]:
    """A function, and the states in which it was called on real tensors."""
    seen: list[dict[str, Any]] = []

    def fn(a: torch.Tensor) -> torch.Tensor:
        if type(a) is torch.Tensor:
            seen.append(state())
        out = a @ a + torch.ones(())  # autocast changes the dtype, a device its place
        assert out.dtype is torch.float32
        return out

    return seen, fn


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("traced", ["inside", "before"])
def test_fn_runs_in_a_clean_state(name: str, jit: bool, traced: str) -> None:
    seen, fn = observer()
    f = torch2jax(fn)
    call = jax.jit(f) if jit else f
    expected = plain_state()
    if traced == "before":
        jax.block_until_ready(call(X))
    with STATES[name]():
        before = state()
        out = call(X)
        jax.block_until_ready(out)
        assert state() == before
    assert all(s == expected for s in seen), seen
    assert seen
    np.testing.assert_allclose(np.asarray(out), X @ X + 1)


@pytest.mark.parametrize("name", STATES)
def test_derivatives_and_batches_in_every_state(name: str) -> None:
    f = torch2jax(lambda a: torch.sin(a) @ a)
    twin = lambda a: jax.numpy.sin(a) @ a  # noqa: E731
    with STATES[name]():
        before = state()
        grad = jax.jit(jax.grad(lambda a: f(a).sum()))(X)
        forward = jax.jvp(f, (X,), (X,))[1]
        rows = jax.vmap(f)(np.stack([X, 2 * X]))
        second = jax.hessian(lambda a: f(a).sum())(X)
        jax.block_until_ready((grad, forward, rows, second))
        assert state() == before
    np.testing.assert_allclose(grad, jax.grad(lambda a: twin(a).sum())(X), rtol=1e-5)
    np.testing.assert_allclose(forward, jax.jvp(twin, (X,), (X,))[1], rtol=1e-5)
    np.testing.assert_allclose(rows, jax.vmap(twin)(np.stack([X, 2 * X])), rtol=1e-5)
    np.testing.assert_allclose(
        second, jax.hessian(lambda a: twin(a).sum())(X), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("mode", [Functions, Dispatches])
def test_the_callers_modes_see_nothing(mode: Any) -> None:
    f = torch2jax(lambda a: torch.sin(a) * 2)
    with mode() as active:
        jax.block_until_ready(f(X))
        jax.block_until_ready(jax.grad(lambda a: f(a).sum())(X))
    assert active.seen == 0


@pytest.mark.parametrize("name", STATES)
def test_state_is_restored_after_an_exception(name: str) -> None:
    def fn(a: torch.Tensor) -> torch.Tensor:
        if type(a) is torch.Tensor:
            raise ValueError("on purpose")
        return a

    f = torch2jax(fn, output_shapes=torch.Size((3, 3)))
    with STATES[name]():
        before = state()
        with pytest.raises(RuntimeError, match="on purpose"):
            f(X)
        assert state() == before


def test_what_fn_switches_on_ends_with_it() -> None:
    def fn(a: torch.Tensor) -> torch.Tensor:
        torch.set_grad_enabled(True)
        return a * 2

    before = state()
    jax.block_until_ready(torch2jax(fn)(X))
    jax.block_until_ready(jax.jit(torch2jax(fn))(X))
    assert state() == before


def test_defaults_are_those_of_wrap_time() -> None:
    def fn(a: torch.Tensor) -> torch.Tensor:
        return torch.ones(2, dtype=a.dtype) * torch.finfo().bits

    with default_dtype(torch.float64):
        wide = torch2jax(fn)
    narrow = torch2jax(fn)
    assert wide is not narrow
    np.testing.assert_array_equal(wide(X), [64, 64])
    np.testing.assert_array_equal(narrow(X), [32, 32])
    with default_dtype(torch.float64):
        np.testing.assert_array_equal(narrow(X + 1), [32, 32])
    np.testing.assert_array_equal(wide(X + 1), [64, 64])


def test_grad_inside_of_fn() -> None:
    """fn may switch gradients on by itself, as forces and physics-informed losses do."""

    def fn(a: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        with torch.enable_grad():
            a = a.detach().requires_grad_()
            return torch.autograd.grad(a.sin().sum(), a)[0]

    np.testing.assert_allclose(torch2jax(fn)(X), np.cos(X), rtol=1e-6)


def test_autocast_inside_of_fn() -> None:
    def fn(a: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return a @ a

    assert torch2jax(fn)(X).dtype == jax.numpy.bfloat16


@pytest.mark.parametrize("name", STATES)
def test_from_python_threads_with_their_own_state(name: str) -> None:
    seen, fn = observer()
    f = torch2jax(fn)
    expected = plain_state()

    def work(_: int) -> None:
        with STATES[name]():
            before = state()
            for _ in range(3):
                np.testing.assert_allclose(np.asarray(jax.jit(f)(X)), X @ X + 1)
            assert state() == before

    # The default dtype belongs to the process, so that state is not for many threads at once.
    count = 1 if name == "default_dtype" else 4
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(work, range(count)))
    assert seen
    assert all(s == expected for s in seen)


def test_from_xlas_threads() -> None:
    """A large program is dispatched asynchronously; whichever thread calls, the state is clean."""
    seen, fn = observer()
    f = torch2jax(fn)
    threads: set[int] = set()
    g = torch2jax(lambda a: (threads.add(threading.get_ident()), a + 1)[1])
    expected = plain_state()
    big = np.ones((300, 300), np.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        out = jax.jit(lambda a: g(f(a @ a) + f(a) + f(a.T)))(big)
        jax.block_until_ready(out)
    assert len(seen) >= 3
    assert all(s == expected for s in seen)
