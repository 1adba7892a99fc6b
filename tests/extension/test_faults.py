"""What goes wrong at every place where Python can raise, and at a process's end: no crash, no hang,
and the next call is right. Mistakes of users are in bridge/test_errors.py."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torch2jax import SignatureError, Size, TorchCallError, torch2jax

PACKAGE = torch2jax.__module__.partition(".")[0]
X = np.arange(1, 5, dtype=np.float32)


@pytest.fixture(autouse=True)
def the_next_call_works() -> Iterator[None]:
    yield
    f = torch2jax(lambda a: (a * a).sum())
    np.testing.assert_array_equal(f(X), 30)
    np.testing.assert_array_equal(jax.jit(jax.grad(f))(X), 2 * X)


def real(a: torch.Tensor) -> bool:
    """Whether this is no run that infers shapes."""
    return type(a) is torch.Tensor


# --- exceptions ----------------------------------------------------------------------------------


class Silent(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt

    __repr__ = __str__


class Unprintable(Exception):
    def __str__(self) -> str:
        raise MemoryError

    __repr__ = __str__


EXCEPTIONS: list[BaseException] = [
    MemoryError(),
    RecursionError("deep"),
    KeyboardInterrupt(),
    SystemExit(3),
    GeneratorExit(),
    StopIteration(1),
    Silent(),
    Unprintable(),
    BaseExceptionGroup("several", [ValueError("one"), KeyboardInterrupt()]),
]


class Fails(torch.autograd.Function):
    error: BaseException

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        return a * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        raise Fails.error


ERRORS = (RuntimeError, ValueError)
"""As which an error of XLA comes, and our own."""
ENDS = (KeyboardInterrupt, SystemExit)
"""What an eager call lets through as it is."""


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("error", EXCEPTIONS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_exceptions_of_every_kind(where: str, error: BaseException, jit: bool) -> None:
    def fn(a: torch.Tensor) -> torch.Tensor:
        if where == "backward":
            return Fails.apply(a)
        if real(a):
            raise error
        return a * 2

    Fails.error = error
    f = torch2jax(fn, output_shapes=Size([4]))
    call = (lambda a: jax.grad(lambda a: f(a).sum())(a)) if where == "backward" else f
    eager = where == "forward" and not jit
    expected: Any = ERRORS
    words: str | None = type(error).__name__
    if eager and isinstance(error, ENDS):
        expected, words = ENDS, None
    with pytest.raises(expected, match=words) as caught:
        jax.block_until_ready((jax.jit(call) if jit else call)(X))
    if eager and isinstance(error, ENDS):
        assert caught.value is error
        assert "fn" in [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    elif eager and not isinstance(error, Silent):
        assert isinstance(caught.value, TorchCallError)
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("cause", [None, ValueError("before")], ids=["", "cause"])
def test_the_cause_of_an_exit(cause: BaseException | None) -> None:
    """It is the user's own: no error of XLA shows in the traceback."""

    def fn(a: torch.Tensor) -> torch.Tensor:
        raise SystemExit(3) from cause

    with pytest.raises(SystemExit) as caught:
        torch2jax(fn, output_shapes=Size([4]))(X)
    assert caught.value.code == 3
    assert caught.value.__cause__ is cause
    assert caught.value.__suppress_context__
    text = "".join(traceback.format_exception(caught.value))
    assert "INTERNAL" not in text
    assert ("before" in text) == (cause is not None)


def test_a_real_out_of_memory() -> None:
    f = torch2jax(lambda a: torch.empty(2**60).sum() + a, output_shapes=Size([4]))
    with pytest.raises(TorchCallError, match=r"(?i)memory"):
        f(X)


def test_a_real_recursion() -> None:
    def fn(a: torch.Tensor) -> torch.Tensor:
        return fn(a + 1) if real(a) else a

    with pytest.raises(TorchCallError, match="RecursionError"):
        torch2jax(fn, output_shapes=Size([4]))(X)


def test_an_exception_that_carries_its_argument() -> None:
    """Its memory is XLA's, which uses it again: the exception gets a copy."""
    kept: list[Exception] = []

    def fn(a: torch.Tensor) -> torch.Tensor:
        error = ValueError("bad", a, 3)
        error.tensor = a[1:]  # type: ignore[attr-defined]
        kept.append(error)
        raise error

    with pytest.raises(TorchCallError) as caught:
        torch2jax(fn, output_shapes=Size([4]))(jnp.asarray(X))
    error = caught.value.__cause__
    assert error is kept[0]
    array = jnp.asarray(X)
    with pytest.raises(TorchCallError):
        torch2jax(fn, output_shapes=Size([4]))(array)
    pointer = array.unsafe_buffer_pointer()
    carried = kept[1]
    assert carried.args[1].untyped_storage().data_ptr() != pointer
    assert carried.tensor.untyped_storage().data_ptr() != pointer  # type: ignore[attr-defined]
    np.testing.assert_array_equal(carried.args[1], X)
    assert carried.args[::2] == ("bad", 3)


def test_an_object_whose_release_raises() -> None:
    released: list[bool] = []

    class Loud:
        def __del__(self) -> None:
            released.append(True)
            raise ValueError("on release")

    def fn(a: torch.Tensor) -> torch.Tensor:
        loud = Loud()
        cycle: list[Any] = [a, loud]
        cycle.append(cycle)
        return a * 2

    seen: list[Any] = []
    before, sys.unraisablehook = sys.unraisablehook, lambda args: seen.append(str(args.exc_value))
    try:
        np.testing.assert_array_equal(torch2jax(fn, output_shapes=Size([4]))(X), 2 * X)
    finally:
        sys.unraisablehook = before
    assert released == [True]
    assert seen == ["on release"]


class BadTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ValueError("no function is allowed")


def test_a_result_that_raises_when_it_is_read() -> None:
    f = torch2jax(
        lambda a: torch.Tensor._make_subclass(BadTensor, torch.ones(2, 4)[:, 1]),
        output_shapes=Size([2]),
    )
    try:
        y = f(X)
    except TorchCallError as error:
        assert "no function is allowed" in str(error)  # noqa: PT017
    else:
        np.testing.assert_array_equal(y, [1, 1])


@pytest.mark.parametrize("method", ["__array__", "shape", "dtype"])
def test_arguments_that_raise_when_they_are_read(method: str) -> None:
    class Bad:
        def __getattribute__(self, name: str) -> Any:
            if name == method:
                raise OSError(f"no {method}")
            return object.__getattribute__(self, name)

    f = torch2jax(lambda a, b: a * 2)
    with pytest.raises((SignatureError, OSError)):
        f(X, Bad())
    np.testing.assert_array_equal(f(X, X), 2 * X)


def test_exceptions_of_many_threads_find_their_callers() -> None:
    failures: list[BaseException] = []

    def work(i: int) -> None:
        def fn(a: torch.Tensor) -> torch.Tensor:
            raise KeyError(i)

        f = torch2jax(fn, output_shapes=Size([4]))
        for _ in range(40):
            try:
                f(X)
            except TorchCallError as error:
                # More threads than exceptions are kept: the text is there, the cause may not be.
                if f"KeyError: {i}" not in str(error):
                    failures.append(error)
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(20)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures, failures[:3]


# --- processes -----------------------------------------------------------------------------------


def run_python(source: str, status: int = 0) -> str:
    """The output of a process that ends with this status."""
    header = f"""
import atexit, gc, os, signal, sys, threading, time
import jax, jax.numpy as jnp, numpy as np, torch
from {PACKAGE} import torch2jax, Size, TorchCallError, Torch2JaxError
x = jnp.arange(1.0, 5.0)
def right():
    f = torch2jax(lambda a: (a * a).sum())
    np.testing.assert_array_equal(f(x), 30)
    np.testing.assert_array_equal(jax.jit(jax.grad(f))(x), 2 * x)
    print("right", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", header + textwrap.dedent(source)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Fatal" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_interrupt_of_a_long_call(jit: bool) -> None:
    out = run_python(f"""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
        def fn(a):
            end = time.monotonic() + 60
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            while time.monotonic() < end:
                a = a + 1
            return a
        f = torch2jax(fn, output_shapes=Size([4]))
        try:
            jax.block_until_ready((jax.jit(f) if {jit} else f)(x))
        except KeyboardInterrupt:
            print("itself")
        except (RuntimeError, ValueError) as error:
            print("KeyboardInterrupt" in repr(error) and "in the text")
        right()
    """)
    assert out == ("in the text" if jit else "itself") + "\nright\n"


def test_exit_inside_the_function() -> None:
    """It ends the process with its status, through `except Exception`."""
    out = run_python(
        """
        f = torch2jax(lambda a: sys.exit(5), output_shapes=Size([4]))
        for call in (f, jax.jit(f)):
            try:
                jax.block_until_ready(call(x))
            except SystemExit as error:
                print(error.code)
            except Exception as error:
                print("SystemExit: 5" in str(error))
        right()
        try:
            f(x)
        except Exception:
            print("not reached")
        """,
        status=5,
    )
    assert out == "5\nTrue\nright\n"


def test_a_call_at_exit() -> None:
    """The handlers run in the reverse order: this one before ours."""
    assert run_python("atexit.register(right)\nright()") == "right\nright\n"


def test_a_call_after_shutdown_has_begun() -> None:
    """A finalizer that runs when modules are torn down gets an error or the result; no crash."""
    run_python("""
        class Late:
            def __del__(self, f=torch2jax(lambda a: a * 2), x=x, call=jax.block_until_ready):
                try:
                    call(f(x))
                except Exception:
                    pass
        sys.late = Late()
        right()
    """)


def test_a_call_before_the_import_of_the_rest() -> None:
    """atexit runs what was registered before the import last, when calls are refused."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(f"""
                import atexit
                def late():
                    try:
                        jax.block_until_ready(f(x))
                    except Exception as error:
                        print("shutting down" in str(error))
                atexit.register(late)
                import jax, jax.numpy as jnp
                from {PACKAGE} import torch2jax
                f, x = torch2jax(lambda a: a * 2), jnp.ones(3)
                jax.block_until_ready(f(x))
            """),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_exit_with_work_pending() -> None:
    run_python("""
        f = torch2jax(lambda a: (time.sleep(0.05), a + 1)[1], output_shapes=Size([300, 300]))
        program = jax.jit(lambda a: jax.lax.fori_loop(0, 20, lambda _, a: f(a @ a), a))
        right()
        program(jnp.ones((300, 300)) / 300)
    """)


def test_threads_born_after_the_import() -> None:
    f = torch2jax(lambda a: (a.sin() * a).sum())
    got: list[Any] = []
    for _ in range(20):
        thread = threading.Thread(target=lambda: got.append(jax.grad(f)(jnp.asarray(X))))
        thread.start()
        thread.join()
    assert len(got) == 20
    for g in got:
        np.testing.assert_allclose(g, np.sin(X) + X * np.cos(X), rtol=1e-5)


def test_a_forked_process_is_refused() -> None:
    """By the wrapper, and by the handler of a program compiled before. The parent goes on.

    The child ends by os._exit: after plain jax.jit too, JAX crashes where a forked process ends.
    """
    out = run_python("""
        import warnings
        warnings.simplefilter("ignore")
        f = torch2jax(lambda a: a * 2)
        program = jax.jit(f)
        jax.block_until_ready((f(x), program(x)))
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            for call in (f, program):
                try:
                    jax.block_until_ready(call(x))
                except Exception as error:
                    print("os.fork()" in str(error), flush=True)
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        right()
    """)
    assert out == "True\nTrue\n7\nright\n"
