"""Mistakes as a new user meets them: what is raised, what it says, and that the next call works."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion

from torch2jax import (
    DifferentiationError,
    SignatureError,
    Size,
    Torch2JaxError,
    Torch2JaxWarning,
    TorchCallError,
    UnsupportedDtypeError,
    device,
    from_module,
    torch2jax,
)
from torch2jax.device.setup import enable

X = np.arange(1, 5, dtype=np.float32)


def same(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def the_next_call_works() -> Iterator[None]:
    yield
    same(torch2jax(lambda a, b: a @ b)(X, X), X @ X)
    same(jax.jit(jax.grad(torch2jax(lambda a: (a * a).sum())))(X), 2 * X)


# What JAX raises under a user's own jit: ValueError where a second call takes its quick path.
COMPILED = (RuntimeError, ValueError)


class DynamicCache:
    """As the cache of Hugging Face's transformers."""


# --- arguments -----------------------------------------------------------------------------------


def model(a: torch.Tensor, b: torch.Tensor, *, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
    return a * b * scale


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((X,), {}, r"model\(.*1 positional argument\b.*missing.*'b'"),
        ((X, X, X), {}, r"model\(.*3 positional arguments.*too many"),
        ((), {}, r"model\(.*0 positional arguments"),
        ((X, X), {"sclae": X}, r"model\(.*sclae"),
        ((X, X), {"a": X}, r"model\(.*'a'"),
    ],
    ids=["too few", "too many", "none", "misspelt", "twice"],
)
def test_wrong_arguments(args: Any, kwargs: Any, words: str, jit: bool) -> None:
    f = torch2jax(model)
    with pytest.raises(SignatureError, match=words):
        (jax.jit(f) if jit else f)(*args, **kwargs)
    same(f(X, X), X * X)


def test_wrong_arguments_of_a_module() -> None:
    f = torch2jax(torch.nn.Linear(4, 2))
    with pytest.raises(SignatureError, match=r"Linear.*2 positional arguments"):
        f(X, X)
    assert f(X).shape == (2,)


def test_another_tree_than_the_examples() -> None:
    f = torch2jax(lambda d: d["w"] * 2, {"w": torch.ones(4)})
    with pytest.raises(SignatureError, match=r"'w': \*.*'v': \*"):
        f({"v": X})
    with pytest.raises(SignatureError, match=r"\(\*"):
        f(X)
    same(f({"w": X}), 2 * X)


@pytest.mark.parametrize("nested", [False, True])
def test_tensors_as_arguments(nested: bool) -> None:
    f = torch2jax(lambda a: (a["x"] if nested else a) * 2)
    t = torch.ones(4)
    with pytest.raises(SignatureError, match=r"args\[0\].*t2j") as caught:
        f({"x": t} if nested else t)
    assert not nested or "args[0]['x']" in str(caught.value)


@pytest.mark.parametrize("kind", ["object", "function", "list of strings", "numpy strings"])
def test_arguments_that_are_no_arrays(kind: str) -> None:
    value: Any = {
        "object": DynamicCache(),
        "function": torch.sin,
        "list of strings": np.array([object()]),
        "numpy strings": np.array(["a"]),
    }[kind]
    f = torch2jax(lambda a, b: a * 2)
    with pytest.raises(TypeError, match=r"args\[1\]") as caught:
        f(X, value)
    assert isinstance(caught.value, Torch2JaxError)


def test_unhashable_static_arguments() -> None:
    f = torch2jax(lambda a, shape: a.reshape(shape), static_argnums=1)
    with pytest.raises(SignatureError, match=r"args\[1\].*list.*tuple"):
        f(X, [2, 2])
    assert f(X, (2, 2)).shape == (2, 2)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "float8_e3m4"])
def test_unsupported_dtypes(dtype: str) -> None:
    f = torch2jax(lambda a: a)
    with pytest.raises(UnsupportedDtypeError, match=rf"args\[0\].*{dtype}"):
        f(jnp.ones(3, getattr(jnp, dtype)))


@pytest.mark.parametrize("batched", [False, True])
def test_random_keys(batched: bool) -> None:
    key = jax.random.key(0)
    with pytest.raises(UnsupportedDtypeError, match=r"args\[0\].*key_data"):
        torch2jax(lambda k: k)(jax.random.split(key) if batched else key)
    with pytest.raises(UnsupportedDtypeError, match="key_data"):
        jax.jit(torch2jax(lambda k: k))(key)


def test_symbolic_shapes() -> None:
    f = torch2jax(lambda a: a * 2)
    (n,) = jax.export.symbolic_shape("n")
    with pytest.raises(SignatureError, match=r"args\[0\].*symbolic.*concrete"):
        jax.export.export(jax.jit(f))(jax.ShapeDtypeStruct((n,), jnp.float32))


def test_symbolic_shapes_of_declared_results() -> None:
    f = torch2jax(lambda a: a * 2, output_shapes=Size([4]))
    (n,) = jax.export.symbolic_shape("n")
    with pytest.raises(SignatureError, match="symbolic"):
        jax.export.export(jax.jit(lambda a: jax.vmap(f)(a)))(
            jax.ShapeDtypeStruct((n, 4), jnp.float32)
        )


def test_static_arguments_that_there_are_not() -> None:
    with pytest.raises(SignatureError, match=r"static_argnums .*names argument 5.* takes 1 pos"):
        torch2jax(lambda x: x, static_argnums=5)
    with pytest.raises(SignatureError, match=r"static_argnames .*names 'm'"):
        torch2jax(lambda x: x, static_argnames="m")


def test_numbers_whose_values_make_a_shape() -> None:
    with pytest.raises(
        SignatureError, match=r"depends on the values(.|\n)*args\[1\]: name them in"
    ):
        torch2jax(lambda x, n: torch.zeros(int(n)))(X, 2)
    assert torch2jax(lambda x, n: x.repeat(n), static_argnums=1)(X, 2).shape == (8,)


def test_a_wrong_shape_is_not_blamed_on_made_up_values() -> None:
    with pytest.raises(TorchCallError) as caught:
        torch2jax(lambda a, b: a @ b)(X[:2], X)
    assert "made-up values" not in str(caught.value)


def test_what_is_wrapped_must_be_callable() -> None:
    with pytest.raises(SignatureError, match=r"callable.*Tensor"):
        torch2jax(torch.ones(3))  # type: ignore[arg-type]


# --- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda a: "text", r"str"),
        (lambda a: None, r"None.*side_effects"),
        (lambda a: DynamicCache(), r"DynamicCache"),
        (
            lambda a: {"logits": a, "past_key_values": DynamicCache()},
            r"\['past_key_values'\]: DynamicCache",
        ),
        (lambda a: {"out": [(a, DynamicCache())]}, r"\['out'\]\[0\]\[1\]: DynamicCache"),
        (lambda a: (a, "text"), r"\[1\]: str"),
        (lambda a: a.to_sparse(), r"sparse.*to_dense"),
        (lambda a: {"s": a.to_sparse()}, r"\['s'\].*to_dense"),
        (lambda a: a.to(torch.complex32), r"complex32"),
        (lambda a: a.to("meta"), r"meta"),
        (lambda a: a.numpy(), r"ndarray.*from_numpy"),
        (lambda a: torch.nn.Linear(4, 4), r"Linear"),
        (lambda a: iter([a]), r"list_iterator"),
        (lambda a: jnp.ones(3), r"Array.*j2t"),
    ],
    ids=[
        "str",
        "None",
        "object",
        "nested object",
        "deep object",
        "nested str",
        "sparse",
        "nested sparse",
        "dtype",
        "meta",
        "ndarray",
        "module",
        "iterator",
        "jax array",
    ],
)
def test_results_without_counterpart(fn: Any, words: str, jit: bool) -> None:
    f = torch2jax(fn)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ComplexHalf")
        with pytest.raises((SignatureError, UnsupportedDtypeError), match=words):
            (jax.jit(f) if jit else f)(X)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda a: a[:2], [r"result", r"float32\[2\]", r"float32\[4\]"]),
        (lambda a: a[None], [r"float32\[1,4\]", r"float32\[4\]"]),
        (lambda a: a.int(), [r"int32\[4\]", r"float32\[4\]"]),
        (lambda a: a.half(), [r"float16\[4\]", r"float32\[4\]"]),
        (lambda a: a.to_sparse(), ["sparse"]),
        (lambda a: "text", ["str"]),
        (lambda a: None, ["None"]),
        (lambda a: (a, a), ["structure"]),
        (lambda a: DynamicCache(), ["DynamicCache"]),
    ],
    ids=["shape", "rank", "dtype", "half", "sparse", "str", "None", "structure", "object"],
)
def test_results_against_output_shapes(fn: Any, words: list[str], jit: bool) -> None:
    f = torch2jax(fn, output_shapes=Size([4]))
    with pytest.raises(RuntimeError) as caught:
        jax.block_until_ready((jax.jit(f) if jit else f)(X))
    for word in ["lambda", *words]:
        assert re.search(word, str(caught.value)), (word, str(caught.value))


def test_which_of_many_results_disagrees() -> None:
    f = torch2jax(
        lambda a: {"x": a, "y": [a, a[:1]]},
        output_shapes={"x": Size([4]), "y": [Size([4]), Size([4])]},
    )
    with pytest.raises(RuntimeError, match=r"\['y'\]\[1\] is float32\[1\].*float32\[4\]"):
        jax.block_until_ready(f(X))


@pytest.mark.parametrize(
    ("declared", "returned"),
    [([0, 0], (0, 0)), ((0, 0), [0, 0]), ({"y": [0, (0,)]}, {"y": (0, [0])})],
    ids=str,
)
def test_declared_lists_and_tuples_are_one(declared: Any, returned: Any) -> None:
    shapes = jax.tree.map(lambda _: Size([4]), declared)
    f = torch2jax(lambda a: jax.tree.map(lambda _: a + 1, returned), output_shapes=shapes)
    for call in (f, f, jax.jit(f)):
        out = call(X)
        assert jax.tree.structure(out) == jax.tree.structure(declared)
        for leaf in jax.tree.leaves(out):
            same(leaf, X + 1)
    with pytest.raises(TorchCallError, match="another structure"):
        jax.block_until_ready(torch2jax(lambda a: (a, {"b": a}), output_shapes=shapes)(X))


def test_disagreements_of_an_eager_call_are_of_this_package() -> None:
    """The user who catches Torch2JaxError catches this one too."""
    for fn in (lambda a: a[:2], lambda a: (a, a), lambda a: "text"):
        with pytest.raises(Torch2JaxError):
            jax.block_until_ready(torch2jax(fn, output_shapes=Size([4]))(X))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_structure_that_changes_at_run_time(jit: bool) -> None:
    many = [False]

    def fn(a: torch.Tensor) -> Any:
        return (a, a) if many[0] else (a,)

    f = torch2jax(fn)
    call = jax.jit(f) if jit else f
    same(call(X)[0], X)
    many[0] = True
    with pytest.raises(COMPILED if jit else TorchCallError, match="fn returned another structure"):
        jax.block_until_ready(call(X))
    many[0] = False
    same(call(X)[0], X)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "fn",
    [lambda a: a[a > 2], lambda a: a[a > 100], torch.nonzero, torch.unique],
    ids=["some", "none", "nonzero", "unique"],
)
def test_a_shape_that_depends_on_values(fn: Any, jit: bool) -> None:
    """An error, also where a guess says that the result is empty: XLA drops a call whose results are."""
    f = torch2jax(fn)
    x = np.array([0, 1, 2, 3, 3, 500], np.float32)
    with pytest.raises((Torch2JaxError, RuntimeError)):
        jax.block_until_ready((jax.jit(f) if jit else f)(x))


def test_shapes_inside_may_depend_on_values() -> None:
    f = torch2jax(lambda a: a[a > 2].sum())
    same(f(X), 7)


@pytest.mark.parametrize("calls_before", [0, 1, 2, 3])
def test_an_exception_after_calls_that_worked(calls_before: int) -> None:
    """JAX has a quick path from the second call on, which raises another type for the same failure."""
    fails = [False]
    error = KeyError("late")

    def fn(a: torch.Tensor) -> torch.Tensor:
        if fails[0]:
            raise error
        return a * 2

    f = torch2jax(fn)
    x = jnp.asarray(X)
    for _ in range(calls_before):
        same(f(x), 2 * X)
    f.lower(x)
    fails[0] = True
    with pytest.raises(TorchCallError, match="late") as caught:
        f(x)
    assert caught.value.__cause__ is error
    fails[0] = False
    same(f(x), 2 * X)


def test_output_shapes_without_shapes() -> None:
    with pytest.raises(SignatureError, match=r"output_shapes.*\['a'\]"):
        torch2jax(lambda a: a, output_shapes={"a": 3})(X)


# --- exceptions in fn ----------------------------------------------------------------------------


class Custom(Exception):
    pass


class Nasty(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def raiser(error: BaseException, when: str = "values") -> Any:
    def deep(a: torch.Tensor) -> torch.Tensor:
        if when == "always" or type(a) is torch.Tensor:
            raise error
        return a * 2

    def fn(a: torch.Tensor) -> torch.Tensor:
        return deep(a)

    return fn


@pytest.mark.parametrize(
    "error",
    [Custom("details of 7 %s {}"), ValueError("ünïcode ✓"), KeyError("k"), Nasty()],
    ids=lambda e: type(e).__name__,
)
def test_an_exception_in_forward(error: Exception) -> None:
    f = torch2jax(raiser(error), output_shapes=Size([4]))
    with pytest.raises(TorchCallError) as caught:
        f(X)
    assert caught.value.__cause__ is error
    text = "" if isinstance(error, Nasty) else str(error)
    for part in ("fn", type(error).__name__, text, "Traceback", "in deep"):
        assert part in str(caught.value)
    with pytest.raises(jax.errors.JaxRuntimeError) as compiled:
        jax.block_until_ready(jax.jit(f)(X))
    for part in (type(error).__name__, text, "Traceback", "in deep"):
        assert part in str(compiled.value)


def test_an_exception_at_trace_time() -> None:
    error = Custom("details")
    f = torch2jax(raiser(error, "always"))
    for call in (f, jax.jit(f)):
        with pytest.raises(
            TorchCallError, match=r"fn raised Custom.*details\n.*args\[0\]: float32\[4\]"
        ) as caught:
            call(X)
        assert type(caught.value.__cause__) is Custom


def test_an_exception_of_torch_at_trace_time() -> None:
    with pytest.raises(TorchCallError, match=r"args\[1\]: float32\[3\]"):
        torch2jax(lambda a, b: a @ b)(X, X[:3])


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        return a.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        raise Custom("backward fails")


def test_an_exception_in_backward() -> None:
    f = torch2jax(lambda a: Backward.apply(a))
    same(f(X), X)
    grad = jax.grad(lambda a: f(a).sum())
    with pytest.raises(RuntimeError, match="Custom: backward fails") as caught:
        grad(X)
    assert "Traceback" in str(caught.value)
    with pytest.raises(RuntimeError, match="Custom: backward fails"):
        jax.block_until_ready(jax.jit(grad)(X))
    same(f(X), X)


def test_an_exception_in_the_middle_of_a_program() -> None:
    limit = [3.0]

    def fn(a: torch.Tensor) -> torch.Tensor:
        if type(a) is torch.Tensor and a[0] >= limit[0]:
            raise Custom("too large")
        return a + 1

    f = torch2jax(fn, output_shapes=Size([4]))
    program = jax.jit(lambda a: jax.lax.fori_loop(0, 5, lambda _, a: f(a), a))
    with pytest.raises(RuntimeError, match="too large"):
        jax.block_until_ready(program(jnp.zeros(4)))
    limit[0] = 100
    same(program(jnp.zeros(4)), np.full(4, 5))


def test_an_exception_under_vmap() -> None:
    f = torch2jax(
        raiser(Custom("rows"), "always"), output_shapes=Size([]), vmap_method="sequential"
    )
    with pytest.raises(RuntimeError, match="rows"):
        jax.block_until_ready(jax.vmap(f)(X))


def test_the_innermost_of_nested_calls() -> None:
    inner = torch2jax(raiser(Custom("inner")), output_shapes=Size([4]))

    def outer(a: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.asarray(inner(a.clone().numpy())))

    with pytest.raises(TorchCallError, match="inner") as caught:
        torch2jax(outer, output_shapes=Size([4]))(X)
    assert isinstance(caught.value.__cause__, TorchCallError)
    assert type(caught.value.__cause__.__cause__) is Custom


def test_each_thread_gets_its_own_exception() -> None:
    def work(i: int) -> None:
        error = Custom(f"thread {i}")
        f = torch2jax(raiser(error), output_shapes=Size([4]))
        for _ in range(10):
            with pytest.raises(TorchCallError, match=f"thread {i}") as caught:
                f(X)
            assert caught.value.__cause__ is error

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=["exit", "ctrl-c"])
def test_what_ends_a_process_passes_an_eager_call(error: BaseException) -> None:
    f = torch2jax(raiser(error), output_shapes=Size([4]))
    with pytest.raises(type(error)) as caught:
        f(X)
    assert caught.value is error


# --- derivatives ---------------------------------------------------------------------------------


def test_past_depth() -> None:
    with pytest.raises(DifferentiationError, match=r"sin.*depth=0.*depth=1.*depth=None"):
        jax.grad(torch2jax(torch.sin, depth=0))(1.0)
    with pytest.raises(DifferentiationError, match=r"depth=1.*depth=2"):
        jax.jacrev(jax.grad(torch2jax(lambda a: torch.sin(a).sum(), depth=1)))(X)


def test_past_depth_in_forward_mode() -> None:
    with pytest.raises(DifferentiationError, match=r"sin.*depth=0.*depth=1.*depth=None"):
        jax.jvp(torch2jax(torch.sin, depth=0), (X,), (X,))
    f = torch2jax(torch.sin, depth=1)
    same(jax.jvp(f, (X,), (X,)), jax.jvp(jnp.sin, (X,), (X,)))
    with pytest.raises(DifferentiationError, match=r"2 times.*depth=1.*depth=2"):
        jax.jacfwd(jax.jacfwd(f))(X)


def test_no_gradient_is_zero_not_an_error() -> None:
    for fn in (lambda a: (a > 2).float(), lambda a: a.detach() * 2, lambda a: torch.ones(4)):
        f = torch2jax(fn)
        same(jax.grad(lambda a, f=f: f(a).sum())(X), np.zeros(4))
        same(jax.jvp(f, (X,), (X,))[1], np.zeros(4))
        same(jax.hessian(lambda a, f=f: f(a).sum())(X), np.zeros((4, 4)))


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["argument", "view", "attribute", "closure"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_tensor_that_outlives_the_call(what: str, jit: bool) -> None:
    kept: list[Any] = []

    def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if type(a) is torch.Tensor:
            kept.append(
                {"argument": b, "view": b[1:], "attribute": {"b": b}, "closure": lambda: b}[what]
            )
        return a + b

    f = torch2jax(fn, output_shapes=Size([4]))
    with pytest.raises(RuntimeError, match=r"fn kept.*args\[1\].*clone\(\)"):
        jax.block_until_ready((jax.jit(f) if jit else f)(X, X))
    kept.clear()
    fine = torch2jax(lambda a: (kept.append(a.clone()), a * 2)[1], output_shapes=Size([4]))
    same(fine(X), X * 2)


def test_a_kept_tensor_in_an_eager_call_is_an_error_of_this_package() -> None:
    kept: list[torch.Tensor] = []
    f = torch2jax(lambda a: (kept.append(a), a * 2)[1], output_shapes=Size([4]))
    with pytest.raises(Torch2JaxError, match=r"clone\(\)"):
        jax.block_until_ready(f(X))


def test_a_kept_graph() -> None:
    kept: list[torch.Tensor] = []

    def fn(a: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            if type(a) is torch.Tensor:
                kept.append((leaf * leaf).sum())
        return a * 2

    with pytest.raises(RuntimeError, match=r"clone\(\)"):
        jax.block_until_ready(torch2jax(fn, output_shapes=Size([4]))(X))


def test_reference_cycles_are_not_kept_tensors() -> None:
    def fn(a: torch.Tensor) -> torch.Tensor:
        cycle: list[Any] = [a]
        cycle.append(cycle)
        return a * 2

    f = torch2jax(fn)
    for _ in range(20):
        same(f(X), X * 2)


def test_old_reference_cycles_are_not_kept_tensors() -> None:
    """A long call, such as the first of torch.compile, leaves cycles that are no longer young."""

    def fn(a: torch.Tensor) -> torch.Tensor:
        if type(a) is torch.Tensor:
            cycle: list[Any] = [a]
            cycle.append(cycle)
            for generation in (0, 1):  # they survive two collections, and then they are old
                gc.collect(generation)
            del cycle
        return a * 2

    same(torch2jax(fn, output_shapes=Size([4]))(X), X * 2)


def test_an_exception_that_keeps_its_frames() -> None:
    f = torch2jax(raiser(Custom("frames")), output_shapes=Size([4]))
    kept = []
    for _ in range(3):
        with pytest.raises(TorchCallError) as caught:
            f(X)
        kept.append(caught)
    same(torch2jax(lambda a: a + 1)(X), X + 1)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.add_(1),
        lambda a: a.__iadd__(1),
        lambda a: a[:].add_(1),
        lambda a: a.__setitem__(slice(None), a + 1),
        lambda a: torch._foreach_add_([a], 1),
    ],
    ids=["method", "operator", "view", "setitem", "foreach"],
)
def test_an_undeclared_change(change: Any, jit: bool) -> None:
    def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        change(b)
        return a * b

    f = torch2jax(fn)
    call = jax.jit(f) if jit else f
    x, y = jnp.asarray(X), jnp.asarray(X) + 0
    with pytest.warns(
        Torch2JaxWarning, match=r"fn changes args\[1\] in place.*inplace_argnums"
    ) as caught:
        out = call(x, y)
    assert len(caught) == 1
    same(out, X * (X + 1))
    same(y, X)
    same(call(x, y), X * (X + 1))
    same(call(x[:2], y[:2]), (X * (X + 1))[:2])
    same(y, X)
    same(jax.grad(lambda b: f(x, b).sum())(y), X)
    with warnings.catch_warnings():
        # torch.func has no batching rules for the _foreach operators.
        warnings.filterwarnings("ignore", ".*fn is called row by row", Torch2JaxWarning)
        same(jax.jacfwd(lambda b: f(x, b))(y), np.diag(X))
        same(jax.vmap(f)(x[None], y[None]), (X * (X + 1))[None])
        same(jax.hessian(lambda b: (f(x, b) ** 2).sum())(y), np.diag(2 * X**2))
    same(y, X)


def test_an_undeclared_change_by_out() -> None:
    f = torch2jax(lambda a: torch.add(a, 1, out=a) * 2)
    y = jnp.asarray(X) + 0
    with pytest.warns(Torch2JaxWarning, match="inplace_argnums"):
        same(f(y), 2 * X + 2)
    same(y, X)


def test_a_change_that_shows_only_at_run_time() -> None:
    def fn(a: torch.Tensor) -> torch.Tensor:
        if type(a) is torch.Tensor and a[0] > 2:
            a.add_(1)
        return a * 2

    f = torch2jax(fn, output_shapes=Size([4]))
    same(f(jnp.asarray(X)), 2 * X)
    with pytest.raises(COMPILED, match=r"changed args\[0\] in place.*inplace_argnums"):
        jax.block_until_ready(jax.jit(f)(jnp.asarray(X) + 5))
    with pytest.raises(Torch2JaxError, match=r"changed args\[0\] in place.*inplace_argnums"):
        jax.block_until_ready(f(jnp.asarray(X) + 5))


def test_warnings_of_fn_are_not_its_exceptions() -> None:
    """What fn warns of is the user's to see; with warnings as errors it is an exception in fn, with its cause."""

    def fn(a: torch.Tensor) -> torch.Tensor:
        warnings.warn("look here", UserWarning, stacklevel=1)
        return a * 2

    with pytest.warns(UserWarning, match="look here"):
        same(torch2jax(fn)(X), 2 * X)


def test_what_an_operator_refuses_is_not_logged_beside(caplog: pytest.LogCaptureFixture) -> None:
    """torch logs each refusal of a fake tensor with its traceback: the exception says it once."""
    with pytest.raises(TorchCallError, match="mat1 and mat2 shapes cannot be multiplied"):
        torch2jax(lambda a, b: a @ b)(jnp.ones((3, 4)), jnp.ones((3, 4)))
    assert not caplog.records


def test_a_torch_that_is_too_old_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch before 2.10 lacks what the device is made with; from a newer one it is taken away here."""
    maker = "torch.utils.backend_registration._setup_privateuseone_for_python_backend"
    monkeypatch.delattr(maker, raising=False)
    monkeypatch.setattr(enable, "_libraries", [])
    for use in (device.enable, lambda: torch2jax(torch.sin, lower=True)(X)):
        with pytest.raises(Torch2JaxError, match=r"needs PyTorch 2\.10 or later"):
            use()
    same(torch2jax(torch.sin)(X), np.sin(X))


def test_a_torch_that_is_too_old_for_its_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1"))
    apply, variables = from_module(torch.nn.Linear(4, 2), compiled=True)
    for use in (lambda: torch2jax(torch.sin, compiled=True), lambda: apply(variables, X)):
        with pytest.raises(Torch2JaxError, match=r"compiled=True needs PyTorch 2\.10 or later"):
            use()
