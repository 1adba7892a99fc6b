"""Random calls, right and wrong: the right value, or an error of this package.

T2J_FUZZ_EXAMPLES=20000 runs that many examples in all, with new seeds each time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from torch2jax import Torch2JaxError, Torch2JaxWarning, dtype_t2j, j2t, t2j, torch2jax

TOTAL = int(os.environ.get("T2J_FUZZ_EXAMPLES", "0"))


def examples(share: float) -> Any:
    """A derandomized handful in every run of the suite, a share of the total where that is set."""
    return settings(
        max_examples=max(int(TOTAL * share), 1) if TOTAL else int(400 * share),
        derandomize=not TOTAL,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


_count = itertools.count(1)


@contextlib.contextmanager
def example() -> Iterator[None]:
    """Around each example: notes are no errors here, and compiled programs do not pile up."""
    if next(_count) % 300 == 0:
        jax.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Torch2JaxWarning)
        warnings.filterwarnings("ignore", "ComplexHalf")
        warnings.filterwarnings("ignore", "Casting complex values")
        yield


# --- tensors and functions of them ---------------------------------------------------------------

ARITHMETIC = ["int8", "int16", "int32", "uint8", "float16", "bfloat16", "float32", "complex64"]
CARRIED = ["bool", "uint16", "uint32", "float8_e4m3fn", "float8_e5m2"]

# Views and copies, right for every dtype. Then arithmetic.
MOVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "same": lambda x: x,
    "clone": lambda x: x.clone(),
    "transposed": lambda x: x.permute(tuple(reversed(range(x.ndim)))),
    "expanded": lambda x: x.unsqueeze(0).expand(3, *x.shape),
    "stepped": lambda x: x[..., ::2] if x.ndim else x,
    "first": lambda x: x[:1] if x.ndim else x,
    "flat": lambda x: x.reshape(-1),
    "new": lambda x: torch.zeros(2, 3, dtype=x.dtype),
}
SUMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "twice": lambda x: x + x,
    "square": lambda x: x * x,
    "same to itself": lambda x: x == x,
    "zeros": torch.zeros_like,
    "flipped": lambda x: x.flip(tuple(range(x.ndim))),
    "conj": lambda x: x.conj(),
    "as complex": lambda x: x.to(torch.complex64),
    "as int64": lambda x: x.real.to(torch.int64),
    "as float64": lambda x: x.real.to(torch.float64),
    "sum": lambda x: x.to(torch.complex64 if x.is_complex() else torch.float32).sum(),
}

SHAPES = st.one_of(
    st.lists(st.integers(0, 4), max_size=3), st.lists(st.integers(1, 2), max_size=6)
).map(tuple)


def tensor(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Small whole numbers: exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2 if dtype == "bool" else 4, shape, generator=generator)
    if dtype == "complex64":
        return torch.complex(values.float(), values.flip(tuple(range(values.ndim))).float())
    return values.to(getattr(torch, dtype))


def array(t: torch.Tensor) -> jax.Array:
    return t2j(t.clone())


def check(got: Any, expected: torch.Tensor) -> None:
    assert isinstance(got, jax.Array)
    narrow = {torch.int64: torch.int32, torch.float64: torch.float32}
    expected = expected.detach().to(narrow.get(expected.dtype, expected.dtype))
    actual = j2t(got)
    assert actual.dtype is expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(bits(actual), bits(expected))


def bits(t: torch.Tensor) -> torch.Tensor:
    dense = torch.empty(t.numel(), dtype=t.dtype)
    return dense.copy_(t.reshape(-1)).view(torch.uint8)


@dataclass
class Leaf:
    """A tensor, or a static value as it is, and what the function does with it."""

    value: Any
    work: str = ""


@st.composite
def leaves(draw: st.DrawFn, dtypes: list[str] | None = None) -> Leaf:
    if dtypes is None and draw(st.integers(0, 9)) == 0:
        return Leaf(draw(st.sampled_from([True, "text", slice(1, 2), torch.float64, b"b", ...])))
    dtype = draw(st.sampled_from(dtypes or ARITHMETIC + CARRIED))
    work = draw(st.sampled_from([*MOVES, *(SUMS if dtype in ARITHMETIC else ())]))
    return Leaf(tensor(dtype, draw(SHAPES), draw(st.integers(0, 3))), work)


def trees(leaf: st.SearchStrategy[Leaf]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaf | st.none(),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=2).map(tuple),
            st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
        ),
        max_leaves=4,
    )


def arguments(leaf: st.SearchStrategy[Leaf]) -> st.SearchStrategy[Any]:
    """``(args, kwargs)`` with at least one tensor."""
    given = st.tuples(
        st.lists(trees(leaf), min_size=1, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(["k", "l"]), trees(leaf), max_size=1),
    )
    return given.filter(lambda tree: any(x.work for x in jax.tree.leaves(tree)))


def torch_function(tree: Any) -> Callable[..., Any]:
    """What each leaf asks for, applied to arguments of that structure."""
    asked = jax.tree.leaves(tree)

    def fn(*args: Any, **kwargs: Any) -> Any:
        out: list[Any] = []
        for leaf, x in zip(asked, jax.tree.leaves((args, kwargs)), strict=True):
            if leaf.work:
                out.append({**MOVES, **SUMS}[leaf.work](x))
            else:
                assert type(x) is type(leaf.value)
                assert x == leaf.value
        return {"all": out, "last": (out[-1], None), "number": 3}

    return fn


def of_torch(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.value, tree)


def of_jax(tree: Any, device: int = 0) -> Any:
    def one(leaf: Leaf) -> Any:
        return jax.device_put(array(leaf.value), jax.devices()[device]) if leaf.work else leaf.value

    return jax.tree.map(one, tree)


def check_all(got: Any, expected: Any) -> None:
    expected = jax.tree.map(torch.as_tensor, expected)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for y, t in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        check(y, t)


def declared(expected: Any) -> Any:
    def one(y: Any) -> Any:
        y = torch.as_tensor(y)
        narrow = {torch.int64: torch.int32, torch.float64: torch.float32}
        dtype = dtype_t2j(narrow.get(y.dtype, y.dtype))
        return jax.ShapeDtypeStruct(tuple(y.shape), dtype)

    return jax.tree.map(one, expected)


# --- right calls ---------------------------------------------------------------------------------


@examples(0.30)
@given(
    arguments(leaves()),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0, 1, 2]),
    st.integers(0, 7),
)
def test_calls(tree: Any, jit: bool, declare: bool, depth: int | None, device: int) -> None:
    with example():
        fn = torch_function(tree)
        args, kwargs = of_torch(tree)
        expected = fn(*args, **kwargs)
        f = torch2jax(fn, output_shapes=declared(expected) if declare else None, depth=depth)
        args, kwargs = of_jax(tree, device)
        if jit:  # static values stay outside
            flat, treedef = jax.tree.flatten((args, kwargs))
            here = [i for i, x in enumerate(flat) if isinstance(x, jax.Array)]

            def run(*xs: Any) -> Any:
                full = list(flat)
                for i, x in zip(here, xs, strict=True):
                    full[i] = x
                args, kwargs = treedef.unflatten(full)
                return f(*args, **kwargs)

            check_all(jax.jit(run)(*(flat[i] for i in here)), expected)
        else:
            check_all(f(*args, **kwargs), expected)


@examples(0.15)
@given(
    st.lists(leaves(ARITHMETIC + CARRIED), min_size=1, max_size=3),
    st.integers(0, 3),
    st.data(),
    st.booleans(),
    st.sampled_from(["auto", "torch", "sequential"]),
)
def test_batches(asked: list[Leaf], rows: int, data: Any, jit: bool, method: str) -> None:
    with example():
        fn = torch_function((tuple(asked), {}))
        dims: list[int | None] = []
        stacked, unstacked = [], []
        for leaf in asked:
            dim = data.draw(st.none() | st.integers(0, leaf.value.ndim))
            dims.append(dim)
            n = 1 if dim is None else rows
            # The same numbers in another order in each row.
            each = [leaf.value.flatten().roll(k).view(leaf.value.shape) for k in range(n)]
            unstacked.append(each if dim is not None else each * rows)
            if dim is None:
                stacked.append(array(leaf.value))
            else:
                shape = list(leaf.value.shape)
                shape.insert(dim, rows)
                empty = torch.empty(shape, dtype=leaf.value.dtype)
                stacked.append(array(torch.stack(each, dim) if n else empty))
        assume(any(dim is not None for dim in dims))
        unbatched = [leaf.value for leaf in asked]
        per_row = [fn(*row) for row in zip(*unstacked, strict=True)] if rows else []
        f = jax.vmap(torch2jax(fn, vmap_method=method), in_axes=tuple(dims))
        try:
            got = (jax.jit(f) if jit else f)(*stacked)
        except Torch2JaxError:
            if method == "torch":  # it has no batching rule for some dtypes
                return
            raise
        for i, y in enumerate(jax.tree.leaves(got)):
            one = torch.as_tensor(jax.tree.leaves(fn(*unbatched))[i])
            each = [torch.as_tensor(jax.tree.leaves(row)[i]) for row in per_row]
            check(y, torch.stack(each) if each else one.new_empty((0, *one.shape)))


@examples(0.05)
@given(
    arguments(leaves(["float32"])),
    st.sampled_from([None, 1]),
    st.sampled_from(["tape", "recompute"]),
    st.booleans(),
)
def test_gradients(tree: Any, depth: int | None, residuals: str, jit: bool) -> None:
    with example():
        fn = torch_function(tree)
        primals = jax.tree.map(lambda leaf: leaf.value.clone().requires_grad_(), tree)
        given, treedef = jax.tree.flatten(primals)
        args, kwargs = primals
        out = [y for y in jax.tree.leaves(fn(*args, **kwargs)) if isinstance(y, torch.Tensor)]
        out = [y for y in out if y.requires_grad and y.dtype is torch.float32]
        loss = sum([(y * 3).sum() for y in out], torch.zeros(()))
        expected: Any = [None] * len(given)
        if out:
            expected = torch.autograd.grad(loss, given, allow_unused=True)
        f = torch2jax(fn, depth=depth, residuals=residuals)

        def jax_loss(*xs: Any) -> Any:
            args, kwargs = treedef.unflatten(xs)
            ys = jax.tree.leaves(f(*args, **kwargs))
            chosen = [y for y, t in zip(ys, chosen_of, strict=True) if t]
            return sum([(y * 3).sum() for y in chosen], jnp.zeros(()))

        chosen_of = [
            isinstance(y, torch.Tensor) and y.requires_grad and y.dtype is torch.float32
            for y in jax.tree.leaves(fn(*args, **kwargs))
        ]
        gradient = jax.grad(jax_loss, argnums=tuple(range(len(given))))
        got = (jax.jit(gradient) if jit else gradient)(*(array(x.detach()) for x in given))
        for g, e, x in zip(got, expected, given, strict=True):
            check(g, torch.zeros_like(x) if e is None else e)


@examples(0.20)
@given(
    st.sampled_from([*ARITHMETIC, *CARRIED]),
    SHAPES,
    st.lists(st.sampled_from(["t", "step", "expand", "slice", "conj", "neg", "grad"]), max_size=3),
    st.integers(0, 3),
)
def test_conversions(dtype: str, shape: tuple[int, ...], steps: list[str], seed: int) -> None:
    with example():
        t = tensor(dtype, shape, seed)
        for step in steps:
            if step == "t":
                t = t.permute(tuple(reversed(range(t.ndim))))
            elif step == "step" and t.ndim:
                t = t[..., ::2]
            elif step == "expand":
                t = t.expand(2, *t.shape)
            elif step == "slice" and t.ndim:
                t = t[1:]
            elif step == "conj":
                t = t.conj()
            elif step == "neg" and t.is_complex():
                t = t.conj().imag
            elif step == "grad" and t.is_floating_point():
                t = t.detach().requires_grad_()
        expected = t.detach().clone()
        a = t2j(t)
        check(a, expected)
        back = j2t(a)
        check(t2j(back), expected)


# --- wrong calls ---------------------------------------------------------------------------------


class Junk:
    """Nothing that anybody knows."""

    def __repr__(self) -> str:
        return "Junk()"


class Hostile:
    """Raises whatever it is asked."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError(f"no {name}")

    def __eq__(self, other: object) -> bool:
        raise ValueError("no ==")

    def __hash__(self) -> int:
        raise ValueError("no hash")

    def __repr__(self) -> str:
        raise ValueError("no repr")


JUNK = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.sampled_from([2**70, float("nan"), 1.5, 1j, "", "args", "tape", "é", b"x"]),
        st.builds(Junk),
        st.sampled_from([torch.float32, torch.int64, torch.Size([4]), torch.Size([]), "cpu"]),
        st.sampled_from([np.float32(1), np.int64(1), np.dtype("M8[s]"), int, Junk, slice(1)]),
        st.sampled_from([jax.ShapeDtypeStruct((4,), "float32"), jax.P("x"), jax.P()]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.sampled_from(["a", "b", 1]), inner, max_size=2),
        st.sets(st.integers(-1, 3), max_size=2),
    ),
    max_leaves=3,
)

X = np.arange(4, dtype=np.float32)

OPTIONS = [
    "example_kw",
    "output_shapes",
    "depth",
    "nondiff_argnums",
    "nondiff_mask",
    "residuals",
    "vmap_method",
    "arg_dtypes",
    "inplace_argnums",
    "out_arg",
    "static_argnums",
    "static_argnames",
    "in_specs",
    "out_specs",
    "mesh",
    "name",
]


@examples(0.10)
@given(st.sampled_from(OPTIONS), JUNK)
def test_wrong_options(option: str, value: Any) -> None:
    """The value that is meant or an error of this package; nothing is taken for something else."""
    with example(), contextlib.suppress(Torch2JaxError):
        f = torch2jax(lambda a, b: a * 2 + b, **{option: value})
        y = f(X, X)
        y = y[0] if option == "inplace_argnums" and isinstance(y, tuple) else y
        np.testing.assert_array_equal(y, X * 3)


ARGUMENTS = st.one_of(
    JUNK,
    st.just(torch.ones(4)),
    st.sampled_from(
        [
            np.array(["a"]),
            np.array([object()]),
            np.array(0, "M8[s]"),
            np.zeros(2, "f4,i4"),
            np.ones(4, np.longdouble),
            np.ones(4, np.float64),
            np.ones(4, ">f4"),
            np.ma.masked_array([1.0]),
            np.zeros((0, 3)),
            torch.nn.Linear(1, 1),
            torch.ones(2).to_sparse(),
            torch.ones(2, device="meta"),
        ]
    ),
)


@examples(0.08)
@given(st.lists(ARGUMENTS, max_size=3), st.dictionaries(st.sampled_from("abc"), ARGUMENTS))
def test_wrong_arguments(args: list[Any], kwargs: Any) -> None:
    with example():
        f = torch2jax(lambda a, b: torch.ones(4))
        try:
            y = f(*args, **kwargs)
        except Torch2JaxError:
            return
        assert len(args) + len(kwargs) == 2
        np.testing.assert_array_equal(y, np.ones(4))


RESULTS = st.recursive(
    st.one_of(
        st.sampled_from(["float32", "int32", "int64", "float64", "complex32", "bool", "half"]),
        st.sampled_from(["sparse", "meta", "empty", "scalar", "jax", "numpy", "none", "wrong"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    ),
    max_leaves=3,
)


def made(kind: Any, x: torch.Tensor) -> Any:
    if isinstance(kind, list | tuple):
        return type(kind)(made(k, x) for k in kind)
    if isinstance(kind, dict):
        return {k: made(v, x) for k, v in kind.items()}
    other = {
        "sparse": x.to_sparse,
        "meta": lambda: x.to("meta"),
        "empty": lambda: x[:0],
        "scalar": lambda: 3,
        "jax": lambda: jnp.ones(2),
        "numpy": lambda: np.ones(2),
        "none": lambda: None,
        "wrong": lambda: Junk(),
    }.get(kind)
    return other() if other else x.to(getattr(torch, kind))


CARRIED_RESULTS = {"float32", "int32", "int64", "float64", "bool", "half", "empty", "scalar"}


@examples(0.10)
@given(RESULTS, RESULTS, st.booleans(), st.booleans())
def test_wrong_results(first: Any, second: Any, declare: bool, jit: bool) -> None:
    """The result at run time may differ from the one at trace time, or from the declared one."""
    with example():
        right = torch.tensor([0.0, 1, 2, 3])
        kinds = [first]
        kinds_are_carried = all(
            set(jax.tree.leaves(k)) <= CARRIED_RESULTS | {"none"} for k in (first, second)
        )

        def fn(x: torch.Tensor) -> Any:
            return made(kinds[0], x)

        shapes = declared(made(first, right)) if declare and kinds_are_carried else None
        shapes = shapes if jax.tree.leaves(shapes) else None
        f = torch2jax(fn, output_shapes=shapes)
        call = jax.jit(f) if jit else f
        errors = (Torch2JaxError, RuntimeError, ValueError) if jit else (Torch2JaxError,)
        x = jnp.asarray(X)
        for kind in (first, second):
            kinds[0] = kind
            try:
                got = jax.block_until_ready(call(x))
            except errors:
                continue
            if not any(y.size for y in jax.tree.leaves(got)):
                continue  # XLA drops a call without any element in its results
            # (x,) passes for x: the handler takes a tuple of one as that one.
            check_all(jax.tree.leaves(got), jax.tree.leaves(made(kind, right)))


@examples(0.02)
@given(st.one_of(st.integers(-3, 3), st.lists(st.none() | st.integers(-3, 3), max_size=3), JUNK))
def test_wrong_in_axes(axes: Any) -> None:
    """JAX checks them before this package is asked."""
    axes = tuple(axes) if isinstance(axes, list) else axes
    with example():
        f = torch2jax(lambda a, b: a + b)
        x = jnp.arange(4.0).reshape(2, 2)
        try:
            y = jax.vmap(f, in_axes=axes)(x, x)
        except (TypeError, ValueError, IndexError):
            return
        np.testing.assert_array_equal(y, jax.vmap(lambda a, b: a + b, in_axes=axes)(x, x))


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "argument": lambda bad: torch2jax(lambda a, b: a)(X, bad),
    "static": lambda bad: torch2jax(lambda a, b: a, static_argnums=1)(X, bad),
    "option": lambda bad: torch2jax(lambda a, b: a, residuals=bad),
    "result": lambda bad: torch2jax(lambda a: bad)(X),
    "wrapped": lambda bad: torch2jax(bad),
}


@pytest.mark.parametrize("place", HOSTILE)
def test_objects_that_raise_at_everything(place: str) -> None:
    with pytest.raises((Torch2JaxError, ValueError)):
        HOSTILE[place](Hostile())
    np.testing.assert_array_equal(torch2jax(lambda a: a * 2)(X), X * 2)
