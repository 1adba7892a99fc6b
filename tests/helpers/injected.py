"""Each call that the handler makes to Python, to PyTorch's exchange API and to the allocator fails once.

`make asan` runs this: it needs an extension built with T2J_TESTING, see NOTE [Injected faults] in
cpp/testing.h. After each fault: the process is alive, there is a typed error or the right result,
nothing is kept, and the next call is right. Leaks of memory show in the sanitizer's report.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from raw_calls import ERRORS, TARGET, setup, struct

from torch2jax import (
    Size,
    Torch2JaxError,
    TorchCallError,
    _ext,
    device,
    jax2torch,
    torch2jax,
)
from torch2jax._bridge.torch_side import exceptions
from torch2jax.device.operators import dispatch

testing: Any = _ext
"""The extension with what a T2J_TESTING build adds."""

X = np.arange(1, 5, dtype=np.float32)


@pytest.fixture(params=["default", "capsules"], autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    setup(force_capsules=request.param == "capsules")
    yield request.param
    setup()


def test_the_registry_without_the_gil() -> None:
    testing.stress_registry(threads=8, rounds=300)


def is_freed(reference: weakref.ref[Any]) -> bool:
    """Whether an object is gone, once the frames of exceptions are."""
    if reference() is not None:
        gc.collect()
    return reference() is None


# --- calls of the handler ------------------------------------------------------------------------

kept: list[Any] = []


def twice(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (x * 2,)


def keeps(x: torch.Tensor) -> tuple[torch.Tensor]:
    kept.append(x)
    return (x * 2,)


def cycle(x: torch.Tensor) -> tuple[torch.Tensor]:
    loop: list[Any] = [x]
    loop.append(loop)
    return (x * 2,)


def raises(x: torch.Tensor) -> tuple[torch.Tensor]:
    raise ValueError("of its own")


def changes(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (x.add_(0),)


def swapped(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x += 1
    y += 2
    return (y, x)


def into(x: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor]:
    out.copy_(x)
    out *= 2
    return (out,)


def complexes(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = torch.complex(x, x).conj()
    return (y, y.imag[:1])


F8 = "float8_e8m0fnu"  # travels as an integer
C64 = jnp.complex64

MANY = 12
"""More operands than the handler keeps on its stack."""

# name: the function, its results, the arguments, what they should give (a text: the error)
CASES: dict[str, tuple[Any, list[Any], list[Any], Any]] = {
    "plain": (twice, [struct(4)], [X], [2 * X]),
    "a tensor alone": (lambda x: x * 2, [struct(4)], [X], [2 * X]),
    "many": (
        lambda *xs: tuple(x + i for i, x in enumerate(xs)),
        [struct(4)] * MANY,
        [X] * MANY,
        [X + i for i in range(MANY)],
    ),
    "other than a tuple": (lambda x: {"a": x * 2}, [struct(4)], [X], [2 * X]),
    "carried by another dtype": (
        lambda x: (x.clone(),),
        [struct(4, dtype=getattr(jnp, F8))],
        [jnp.asarray([1, 2, 4, 8], F8)],
        [np.asarray([1, 2, 4, 8])],
    ),
    "carried, not contiguous": (
        lambda x: (x[::2],),
        [struct(2, dtype=getattr(jnp, F8))],
        [jnp.asarray([1, 2, 4, 8], F8)],
        [np.asarray([1, 4])],
    ),
    "not contiguous": (lambda x: (x[::2],), [struct(2)], [X], [X[::2]]),
    "lazily conjugated": (
        complexes,
        [struct(4, dtype=C64), struct(1)],
        [X],
        [X - 1j * X, -X[:1]],
    ),
    "zeros without memory": (
        lambda x: (torch._efficientzerotensor((4,)),),
        [struct(4)],
        [X],
        [0 * X],
    ),
    "in place, swapped": (swapped, [struct(4)] * 2, [X, 2 * X], [2 * X + 2, X + 1]),
    "into the output": (into, [struct(4)], [X], [2 * X]),
    "under autocast": (twice, [struct(4)], [X], [2 * X]),
    "a reference cycle": (cycle, [struct(4)], [X], [2 * X]),
    "a function that raises": (raises, [struct(4)], [X], "of its own"),
    "a function that raises, under autocast": (raises, [struct(4)], [X], "of its own"),
    "a kept tensor": (keeps, [struct(4)], [X], "kept a tensor"),
    "an undeclared change": (changes, [struct(4)], [X], "in place"),
    "another shape": (lambda x: (x[:2],), [struct(4)], [X], "expected a torch.Tensor"),
    "another layout": (lambda x: (x.to_sparse(),), [struct(4)], [X], "with layout sparse_coo"),
    "no tensor": (lambda x: (3,), [struct(4)], [X], "an object of type int"),
    "too few": (lambda x: (), [struct(4)], [X], "returned 0 tensors"),
    "no tuple": (lambda x: None, [struct(4)], [X], "returned NoneType"),
    "an unknown name": (twice, [struct(4)], [X], "no PyTorch function is registered"),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "other than a tuple": {"collect": lambda tree: tuple(tree.values())},
    "in place, swapped": {"inplace": [0, 1], "aliases": {0: 0, 1: 1}},
    "into the output": {"pass_outputs": True},
}


class Made:
    """A compiled call of a case."""

    def __init__(self, case: str) -> None:
        self.run, self.outputs, self.arguments, self.expected = CASES[case]
        self.name, self.guarded = f"injected/{case}", "autocast" in case
        self.options = dict(OPTIONS.get(case, {}))
        self.aliases = self.options.pop("aliases", {})
        self.program = jax.jit(lambda *xs: self.ffi_call(*xs))

    def ffi_call(self, *xs: Any) -> Any:
        call = jax.ffi.ffi_call(TARGET, self.outputs, input_output_aliases=self.aliases)
        return call(*xs, name=self.name)

    def register(self) -> Any:
        """A function of its own, and its entry. The handler looks closely at the first calls."""

        def fn(*xs: Any) -> Any:
            return self.run(*xs)

        def labels(name: str, of: list[Any]) -> list[str]:
            return [f"{name}[{i}]" for i in range(len(of))]

        ins, outs = labels("args", self.arguments), labels("result", self.outputs)
        name = "injected/another" if "unknown" in self.name else self.name
        return fn, _ext.Entry(name, fn, "fn", ins, outs, torch.float32, **self.options)

    def __call__(self) -> Any:
        """The values, or the text of the error."""
        with torch.autocast("cpu") if self.guarded else contextlib.nullcontext():
            try:
                results = jax.block_until_ready(self.program(*self.arguments))
                return [np.asarray(y).astype(np.complex64) for y in results]
            except ERRORS as error:
                return str(error)
            finally:
                kept.clear()

    def is_right(self, got: Any) -> bool:
        if isinstance(self.expected, str) or isinstance(got, str):
            return isinstance(got, str) and str(self.expected) in got
        return all(np.array_equal(a, b) for a, b in zip(got, self.expected, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_each_step_fails_once(case: str, path: str) -> None:
    call = Made(case)
    fn, entry = call.register()
    assert call.is_right(got := call()), got
    del fn, entry

    fn, entry = call.register()
    testing.arm()
    call()
    steps = testing.disarm()
    assert steps, "nothing was counted"
    del fn, entry
    objects = sys.getrefcount(torch.float32), sys.getrefcount(torch.Tensor)
    harmless = 0
    for k, step in enumerate(steps):
        fn, entry = call.register()
        testing.arm(k)
        got = call()
        assert len(testing.disarm()) > k, f"step {k} ({step}) was not reached"
        what = f"step {k} of {len(steps)}, {step}: {got!r}"
        if isinstance(got, str):
            assert got.strip(), what
        else:
            assert call.is_right(got), what
        harmless += call.is_right(got)
        assert call.is_right(call()), f"the call after {what}"
        assert torch.is_grad_enabled(), what
        assert not torch.is_autocast_enabled("cpu"), what
        freed = weakref.ref(fn)
        del fn, entry
        exceptions._exceptions.clear()  # an exception keeps its frames, and they their functions
        assert is_freed(freed), f"the function is kept after {what}"
    print(f"{case}, {path}: {len(steps)} steps, {harmless} of them without effect")
    after = sys.getrefcount(torch.float32), sys.getrefcount(torch.Tensor)
    assert all(b - a < 5 for a, b in zip(objects, after, strict=True)), (objects, after)


@pytest.mark.parametrize("raising", [False, True], ids=["", "raises"])
def test_errors_of_the_wrapper_are_typed(raising: bool) -> None:
    def fn(*xs: torch.Tensor) -> torch.Tensor:
        if raising:
            raise KeyError("of its own")
        return xs[0] * 2

    f = torch2jax(fn, output_shapes=Size([4]))
    arguments = [jnp.asarray(X)] * MANY

    def result() -> Any:
        try:
            return np.asarray(f(*arguments))
        except Torch2JaxError as error:
            return error

    result(), result()
    testing.arm()
    result()
    steps = testing.disarm()
    assert len(steps) > 5
    for k, step in enumerate(steps):
        testing.arm(k)
        got = result()
        testing.disarm()
        if isinstance(got, Torch2JaxError):
            assert isinstance(got, TorchCallError), step
        else:
            assert not raising, step
            np.testing.assert_array_equal(got, 2 * X)
        after = result()
        if raising:
            assert isinstance(after.__cause__, KeyError)
        else:
            np.testing.assert_array_equal(after, 2 * X)


# --- jax2torch -----------------------------------------------------------------------------------


def test_conversions_of_jax2torch() -> None:
    """A new leaf, a known one, what ``t2j`` takes, and a number; forward and backward."""
    f = jax2torch(lambda x, w, a, n: (x * w + a * n, x.sum()))
    w = torch.full((4,), 3.0, requires_grad=True)
    strided = torch.arange(8.0)[::2]

    def both(x: torch.Tensor) -> Any:
        try:
            y, total = f(x, w, strided, 2.0)
            return [y, total, *torch.autograd.grad((y, total), (x, w), (y, total))]
        except (MemoryError, Torch2JaxError) as error:
            return error

    def is_right(got: Any) -> bool:
        x = torch.ones(4)
        y = x * 3 + strided * 2
        return all(map(torch.equal, got, (y, x.sum(), y * 3 + 4, y * x)))

    def leaf() -> torch.Tensor:
        return torch.ones(4, requires_grad=True)

    assert is_right(both(leaf()))
    testing.arm()
    both(leaf())
    steps = testing.disarm()
    assert {"PyWeakref_NewRef", "PyList_New", "PySequence_GetItem"} <= set(steps)
    harmless = 0
    for k, step in enumerate(steps):
        x = leaf()
        testing.arm(k)
        got = both(x)
        assert len(testing.disarm()) > k, f"step {k} ({step}) was not reached"
        if not isinstance(got, Exception):
            assert is_right(got), step
            harmless += 1
        assert is_right(both(x)), f"the call after {step}"
        reference = weakref.ref(x)
        del got, x
        assert is_freed(reference), f"the leaf is kept after {step}"
    print(f"{len(steps)} steps, {harmless} of them without effect")


# --- eager calls on device "jax" -----------------------------------------------------------------


def test_repeated_calls_on_device_jax() -> None:
    """Numbers, views, writes, several results: each step of a call that is known, and of a new one."""
    device.enable()

    def fresh() -> torch.Tensor:
        return torch.arange(6.0).reshape(2, 3).to("jax")

    def calls(a: torch.Tensor) -> Any:
        try:
            b = torch.add(a * 2.5, a, alpha=3)
            b[1].mul_(torch.div(b, 2, rounding_mode="floor").sum())
            torch._foreach_add_([a, b], [b, a])
            return [*a.split([1, 2], 1), b.t().detach(), *torch.sort(a)]
        except MemoryError as error:
            return error

    def is_right(got: Any) -> bool:
        return all(
            torch.equal(x.cpu(), y)
            for x, y in zip(got, calls(torch.arange(6.0).reshape(2, 3)), strict=True)
        )

    for known in (True, False):
        assert is_right(calls(fresh()))
        assert is_right(calls(fresh()))
        if not known:
            dispatch.forget()
        a = fresh()
        testing.arm()
        calls(a)
        steps = testing.disarm()
        assert {"PyObject_Vectorcall", "PyObject_GetAttr", "operator new"} <= set(steps)
        harmless = 0
        chosen = range(0, len(steps), 1 if known else max(len(steps) // 30, 1))
        for k in chosen:
            if not known:
                dispatch.forget()
            a = fresh()
            testing.arm(k)
            got = calls(a)
            testing.disarm()
            if not isinstance(got, Exception):
                assert is_right(got), steps[k]
                harmless += 1
            assert is_right(calls(fresh())), f"the call after {steps[k]}"
            reference = weakref.ref(a)
            del got, a
            assert is_freed(reference), f"the tensor is kept after {steps[k]}"
        print(f"{'known' if known else 'new'}: {len(chosen)} steps, {harmless} without effect")
