"""Every option of torch2jax, alone and under transforms."""

from __future__ import annotations

import collections
import contextlib
import enum
import functools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import precision

from torch2jax import (
    DifferentiationError,
    SignatureError,
    Size,
    Torch2JaxError,
    Torch2JaxWarning,
    torch2jax,
    torch2jax_with_vjp,
    torch2jax_without_vjp,
)

X = np.arange(1, 5, dtype=np.float32)
F32 = jnp.float32


def sds(*shape: int, dtype: Any = F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def same(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance
        )


class Counted:
    """Calls of a torch function, on real tensors and at all."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self.calls = 0
        self.real = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.real += all(type(a) is torch.Tensor for a in args)
        return self.fn(*args, **kwargs)


class Traced(torch.autograd.Function):
    """The identity, which notes every pass backward."""

    passes = 0

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        return a.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        Traced.passes += 1
        return g


# --- examples ------------------------------------------------------------------------------------

EXAMPLES = {
    "none": (),
    "tensors": ({"w": torch.ones(4)}, torch.ones(())),
    "parameters": ({"w": torch.nn.Parameter(torch.ones(4))}, torch.nn.Parameter(torch.ones(()))),
    "arrays": ({"w": jnp.ones(4)}, jnp.ones(())),
    "numpy": ({"w": np.ones(4, np.float32)}, np.float32(1)),
    "structs": ({"w": sds(4)}, sds()),
    "numbers": ({"w": sds(4)}, 1.0),
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_examples(kind: str) -> None:
    f = torch2jax(lambda tree, s: {"out": torch.sin(tree["w"]) * s}, *EXAMPLES[kind])
    twin = lambda tree, s: {"out": jnp.sin(tree["w"]) * s}  # noqa: E731
    tree = {"w": X}
    same(f(tree, 2.0), twin(tree, 2.0))
    same(jax.jit(f)(tree, np.float32(2)), twin(tree, 2.0))
    loss = lambda g: lambda tree, s: g(tree, s)["out"].sum()  # noqa: E731
    same(jax.grad(loss(f), (0, 1))(tree, 2.0), jax.grad(loss(twin), (0, 1))(tree, 2.0))


def test_examples_are_tracers() -> None:
    @jax.jit
    def run(a: jax.Array, b: jax.Array) -> jax.Array:
        return torch2jax(lambda a, b: a @ b, a, b)(a, b)

    same(run(np.eye(4, dtype=np.float32), X), X)
    same(jax.vmap(run, (None, 0))(np.eye(4, dtype=np.float32), np.stack([X, X])), np.stack([X, X]))
    same(jax.grad(lambda b: run(np.eye(4, dtype=np.float32), b).sum())(X), np.ones(4))


def test_example_kw_and_keyword_gradients() -> None:
    def fn(a: torch.Tensor, *, scale: torch.Tensor, shift: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.sin(a) * scale + shift["s"] ** 2

    def twin(a: Any, *, scale: Any, shift: Any) -> Any:
        return jnp.sin(a) * scale + shift["s"] ** 2

    kw = {"scale": np.float32(3), "shift": {"s": X}}
    for f in (
        torch2jax(fn),
        torch2jax(
            fn, torch.ones(4), example_kw={"scale": torch.ones(()), "shift": {"s": torch.ones(4)}}
        ),
    ):
        grad = lambda g: jax.grad(lambda a, kw: g(a, **kw).sum(), (0, 1))(X, kw)  # noqa: E731
        same(f(X, **kw), twin(X, **kw))
        same(grad(f), grad(twin))
        same(jax.jit(grad, static_argnums=0)(f), grad(twin))
        same(
            jax.vmap(lambda s, f=f: f(X, scale=s, shift={"s": X}))(X),
            jax.vmap(lambda s: twin(X, scale=s, shift={"s": X}))(X),
        )


def test_keywords_alone() -> None:
    f = torch2jax(lambda *, a, b: a - b)
    same(f(a=X, b=1.0), X - 1)
    same(f(b=1.0, a=X), X - 1)
    same(jax.grad(lambda b: f(a=X, b=b).sum())(1.0), -4.0)


def test_new_shapes_and_dtypes_at_every_call() -> None:
    fn = Counted(lambda a, b: a * b)
    f = torch2jax(fn, torch.ones(2), torch.ones(2))
    for shape in ((), (1,), (3,), (0,), (2, 3), (3, 1, 2)):
        for dtype in ("float32", "float16", "bfloat16", "int32", "int8", "uint8", "complex64"):
            a = jnp.ones(shape, dtype)
            out = f(a, a)
            assert (out.shape, out.dtype.name) == (shape, dtype)
    same(f(jnp.ones(3, jnp.bool_), X[:3]), X[:3])


@pytest.mark.parametrize("jit", [False, True])
def test_each_shape_is_traced_once(jit: bool) -> None:
    fn = Counted(lambda a: a * 2)
    f = torch2jax(fn)
    call = jax.jit(f) if jit else f
    for _ in range(3):
        call(X)
        call(X[:2])
    assert fn.real == 6
    assert fn.calls == 8  # one inference for each shape


# --- output_shapes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [sds(4), jnp.zeros(4), np.zeros(4, np.float32), torch.zeros(4), torch.Size([4]), Size([4])],
    ids=["struct", "array", "numpy", "tensor", "torch.Size", "Size"],
)
def test_output_shapes(shape: Any) -> None:
    fn = Counted(lambda a: {"y": (a * 2, None), "z": [a.sum()]})
    f = torch2jax(fn, output_shapes={"y": (shape, None), "z": [Size([])]})
    f.lower(X)
    assert fn.calls == 0
    expected = {"y": (X * 2, None), "z": [X.sum()]}
    same(f(X), expected)
    assert fn.calls == 1
    same(jax.jit(f)(X), expected)
    assert fn.calls == 2
    grad = jax.grad(lambda a: f(a)["y"][0].sum())
    grad(X)
    assert fn.real == fn.calls


def test_output_shapes_are_tracers() -> None:
    @jax.jit
    def run(a: jax.Array) -> jax.Array:
        return torch2jax(lambda a: a * 2, output_shapes=a + 1)(a)

    same(run(X), X * 2)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (("bfloat16",), "bfloat16"),
        (("bfloat16", "float16"), "float32"),
        (("float16", "int32"), "float16"),
        (("int32",), "float32"),
        (("complex64", "float32"), "complex64"),
    ],
)
def test_a_bare_size_has_the_result_type_of_the_float_inputs(
    inputs: tuple[str, ...], expected: str
) -> None:
    dtype = getattr(torch, expected)
    f = torch2jax(lambda *xs: sum(x.to(dtype) for x in xs), output_shapes=Size([3]))
    assert f(*(jnp.ones(3, d) for d in inputs)).dtype.name == expected


def test_a_bare_size_for_integers_with_x64() -> None:
    with precision(True):
        f = torch2jax(lambda a: a.double(), output_shapes=Size([3]))
        assert f(jnp.arange(3)).dtype == jnp.float64


# --- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [None, 1, 2, 3])
@pytest.mark.parametrize(
    "option",
    [
        {"nondiff_argnums": 1},
        {"nondiff_argnums": (1,)},
        {"nondiff_argnums": -1},
        {"nondiff_mask": (False, True)},
        {"nondiff_mask": [False, True]},
        {"nondiff_mask": (False, {"p": True})},
    ],
    ids=["int", "tuple", "negative", "prefix", "list", "tree"],
)
def test_nondiff(depth: int | None, option: dict[str, Any]) -> None:
    f = torch2jax(lambda a, d: a**2 * Traced.apply(d["p"]), depth=depth, **option)
    Traced.passes = 0
    grads = jax.grad(lambda a, d: f(a, d).sum(), (0, 1))(X, {"p": X})
    same(grads, (2 * X * X, {"p": np.zeros(4)}))
    second = jax.grad(lambda a: jax.grad(lambda a: f(a, {"p": X}).sum())(a).sum())
    if depth != 1:
        same(second(X), 2 * X)
    assert Traced.passes == 0


def test_nondiff_in_forward_mode() -> None:
    f = torch2jax(lambda a, b: a * b, nondiff_argnums=1)
    same(jax.jacfwd(f, (0, 1))(X, X), (np.diag(X), np.zeros((4, 4))))
    same(jax.vmap(jax.grad(lambda a, b: f(a, b), (0, 1)))(X, X), (X, np.zeros(4)))


def test_inputs_without_tangents_cost_nothing() -> None:
    Traced.passes = 0
    f = torch2jax(lambda a, b: a * Traced.apply(b))
    jax.grad(lambda a: f(a, X).sum())(X)
    assert Traced.passes == 0


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_depth(depth: int) -> None:
    f: Any = torch2jax(torch.sin, depth=depth)
    twin: Any = jnp.sin
    x = np.float32(0.3)
    same(f(x), twin(x))
    same(jax.vmap(f)(X), twin(X))
    for _ in range(depth):
        f, twin = jax.grad(f), jax.grad(twin)
        same(f(x), twin(x))
        same(jax.jit(f)(x), twin(x))
        same(jax.vmap(f)(X), jax.vmap(twin)(X))
    with pytest.raises(DifferentiationError, match=rf"depth={depth}\b.*depth={depth + 1}"):
        jax.grad(f)(x)
    with pytest.raises(DifferentiationError):
        jax.jit(jax.grad(f))(x)
    same(f(x), twin(x))


def test_depth_none_has_no_limit() -> None:
    f: Any = torch2jax(lambda a: torch.exp(2 * a))
    for _ in range(5):
        f = jax.grad(f)
    same(f(0.0), 32.0)


def test_depth_one_in_loops_and_checkpoint() -> None:
    f = torch2jax(lambda a: torch.sin(a), depth=1)

    def run(g: Any) -> Any:
        return lambda x: jax.checkpoint(
            lambda x: jax.lax.scan(lambda c, _: (g(c), None), x, None, length=3)[0]
        )(x)

    same(jax.grad(run(f))(0.3), jax.grad(run(jnp.sin))(0.3))


def test_the_older_names() -> None:
    assert torch2jax_without_vjp(torch.sin) is torch2jax(torch.sin, depth=0)
    with pytest.warns(DeprecationWarning, match="torch2jax"):
        assert torch2jax_with_vjp(torch.sin) is torch2jax(torch.sin)


def test_options_of_older_bridges() -> None:
    f = torch2jax(torch.sin, use_torch_vjp=True, use_zeros=False)
    same(jax.grad(lambda a: f(a).sum())(X), np.cos(X))


# --- inplace_argnums -----------------------------------------------------------------------------


def update(cache: dict[str, torch.Tensor], i: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    mask = (torch.arange(cache["k"].shape[0]) == i)[:, None]
    cache["k"].copy_(torch.where(mask, row, cache["k"]))
    cache["v"].mul_(2)
    return (cache["k"] * cache["v"]).sum(0)


def updated(cache: Any, i: Any, row: Any) -> Any:
    k = jnp.where((jnp.arange(cache["k"].shape[0]) == i)[:, None], row, cache["k"])
    v = cache["v"] * 2
    return (k * v).sum(0), {"k": k, "v": v}


def fresh() -> dict[str, jax.Array]:
    return {"k": jnp.arange(12.0).reshape(3, 4), "v": jnp.ones((3, 4)) + 1}


def test_a_donated_cache_is_updated_where_it_is() -> None:
    step = jax.jit(torch2jax(update, inplace_argnums=0), donate_argnums=0)
    cache, expected = jax.block_until_ready(fresh()), fresh()
    places = jax.tree.map(lambda x: x.unsafe_buffer_pointer(), cache)
    for i in range(3):
        donated = cache
        out, cache = step(cache, jnp.int32(i), X * i)
        want, expected = updated(expected, i, X * i)
        same((out, cache), (want, expected))
        assert jax.tree.map(lambda x: x.unsafe_buffer_pointer(), cache) == places
        assert donated["k"].is_deleted()


def test_a_cache_that_is_not_donated_is_unchanged() -> None:
    f = torch2jax(update, inplace_argnums=0)
    cache = fresh()
    for run in (f, jax.jit(f)):
        same(run(cache, jnp.int32(1), X), updated(cache, 1, X))
        same(cache, fresh())


def losses(g: Any) -> Any:
    def loss(cache: Any, row: Any) -> Any:
        out, new = g(cache, jnp.int32(1), row)
        return (out**2).sum() + (new["k"] ** 3).sum() + (new["v"] * row).sum()

    return loss


@pytest.mark.parametrize("depth", [None, 2])
def test_derivatives_of_an_update(depth: int | None) -> None:
    f, twin = losses(torch2jax(update, inplace_argnums=0, depth=depth)), losses(updated)
    same(jax.grad(f, (0, 1))(fresh(), X), jax.grad(twin, (0, 1))(fresh(), X))
    hessian = lambda g: jax.jacrev(jax.grad(lambda row: g(fresh(), row)))(X)  # noqa: E731
    same(hessian(f), hessian(twin), 1e-4)
    if depth is None:
        same(jax.jvp(f, (fresh(), X), (fresh(), X)), jax.jvp(twin, (fresh(), X), (fresh(), X)))


def test_batches_of_an_update() -> None:
    f = torch2jax(update, inplace_argnums=0)
    rows = np.stack([X, 2 * X])
    caches = jax.tree.map(lambda x: jnp.stack([x, x + 1]), fresh())
    args = (caches, jnp.int32(1), rows)
    for run in (jax.vmap, lambda g, axes: jax.jit(jax.vmap(g, axes))):
        same(run(f, (0, None, 0))(*args), run(updated, (0, None, 0))(*args))
    grad = lambda g: jax.vmap(jax.grad(losses(g)))(caches, rows)  # noqa: E731
    same(grad(f), grad(updated))


def test_batches_of_an_update_of_one_cache() -> None:
    """Rows of an argument, one cache: torch refuses to write them into it, so this may loop."""
    f = torch2jax(update, inplace_argnums=0)
    args = (fresh(), jnp.int32(1), np.stack([X, 2 * X]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Torch2JaxWarning)
        same(jax.vmap(f, (None, None, 0))(*args), jax.vmap(updated, (None, None, 0))(*args))
        grad = lambda g: jax.vmap(jax.grad(losses(g)), (None, 0))(fresh(), args[2])  # noqa: E731
        same(grad(f), grad(updated))


def test_an_update_in_scan() -> None:
    f = torch2jax(update, inplace_argnums=0)

    def run(g: Any) -> Any:
        return lambda cache: jax.lax.scan(
            lambda c, i: g(c, i, X)[::-1], cache, jnp.arange(3, dtype=jnp.int32)
        )

    same(jax.jit(run(f))(fresh()), run(updated)(fresh()))


def test_an_update_that_returns_none() -> None:
    def fn(a: torch.Tensor, b: torch.Tensor) -> None:
        a += b
        b *= 2

    x = jnp.asarray(X)
    same(torch2jax(lambda a, b: fn(a, b.clone()), inplace_argnums=0)(x, x), 2 * X)
    same(torch2jax(lambda a, b: fn(a, b.clone()), inplace_argnums=(0,))(x, x), (2 * X,))
    same(torch2jax(fn, inplace_argnums=(0, 1))(x, x + 1), (2 * X + 1, 2 * X + 2))
    same(x, X)


def test_one_array_for_two_updated_arguments() -> None:
    def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a += 1
        b += 10
        return a + b

    f = torch2jax(fn, inplace_argnums=(0, 1))
    x = jnp.asarray(X)
    for run in (f, jax.jit(f)):
        same(run(x, x), (2 * X + 11, (X + 1, X + 10)))
    same(jax.jit(lambda a: f(a, a))(x), (2 * X + 11, (X + 1, X + 10)))
    same(x, X)


@pytest.mark.parametrize("result", ["same", "view", "flipped", "other"])
def test_an_update_that_returns_what_it_updates(result: str) -> None:
    def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a += 1
        return {"same": a, "view": a.view(2, 2).T, "flipped": a.flip(0), "other": b}[result]

    want = {"same": X + 1, "view": (X + 1).reshape(2, 2).T, "flipped": X[::-1] + 1, "other": X}[
        result
    ]
    f = torch2jax(fn, inplace_argnums=0)
    x = jnp.asarray(X)
    same(f(x, x), (want, X + 1))
    same(jax.jit(f, donate_argnums=0)(jnp.asarray(X) + 0, x), (want, X + 1))


def test_updates_of_an_argument_that_fn_gets_in_another_dtype() -> None:
    """An int64 example widens the operand, which makes a copy: the update must come back all the same."""

    def fn(a: torch.Tensor) -> None:
        assert a.dtype is torch.int64
        a += 1

    for f in (
        torch2jax(fn, torch.arange(3), inplace_argnums=0),
        torch2jax(fn, arg_dtypes=(torch.int64,), inplace_argnums=0),
    ):
        same(f(jnp.arange(3)), np.arange(3) + 1)
        same(jax.jit(f)(jnp.arange(3)), np.arange(3) + 1)
        same(jax.vmap(f)(jnp.ones((2, 3), jnp.int32)), np.full((2, 3), 2))


def test_an_update_by_output_shapes() -> None:
    fn = Counted(lambda a: a.add_(1).sum())
    f = torch2jax(fn, inplace_argnums=0, output_shapes=Size([]))
    same(f(jnp.asarray(X)), (X.sum() + 4, X + 1))
    assert fn.calls == 1


# --- out_arg -------------------------------------------------------------------------------------


def test_out_arg_gets_xlas_buffer() -> None:
    places: list[int] = []

    def fn(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is not None:
            places.append(out.data_ptr())
        return torch.add(a, b, out=out)

    f = torch2jax(fn, out_arg="out")
    for run in (f, jax.jit(f)):
        out = jax.block_until_ready(run(X, X))
        same(out, 2 * X)
        assert places[-1] == out.unsafe_buffer_pointer()
    same(jax.grad(lambda a: f(a, X).sum())(X), np.ones(4))
    same(jax.jacfwd(f)(X, X), np.eye(4))
    same(jax.vmap(f, (0, None))(np.stack([X, X]), X), np.stack([2 * X, 2 * X]))


def test_out_arg_of_torchs_own_functions() -> None:
    f = torch2jax(torch.add, out_arg="out")
    same(f(X, X), 2 * X)
    same(jax.grad(lambda a: f(a, X).sum())(X), np.ones(4))


def test_out_arg_that_fn_requires() -> None:
    """Most functions with a preallocated result, a kernel for instance, cannot do without it."""

    def fn(a: torch.Tensor, *, out: torch.Tensor) -> None:
        torch.sin(a, out=out)

    f = torch2jax(fn, out_arg="out", output_shapes=Size([4]))
    same(f(X), np.sin(X))
    same(jax.jit(f)(X), np.sin(X))


def test_out_arg_by_position() -> None:
    f = torch2jax(lambda a, out: torch.sin(a, out=out), out_arg="out", output_shapes=Size([4]))
    same(f(X), np.sin(X))


def test_out_arg_of_a_tuple() -> None:
    shapes = (sds(2), sds(2, dtype=jnp.int32))

    def fn(a: torch.Tensor, out: Any = None) -> None:
        values, indices = torch.topk(a, 2)
        out[0].copy_(values)
        out[1].copy_(indices)

    same(torch2jax(fn, out_arg="out", output_shapes=shapes)(X), tuple(jax.lax.top_k(X, 2)))


def test_out_arg_that_fn_does_not_write() -> None:
    """What fn returns instead counts, or it is an error; never XLA's uninitialised memory."""
    f = torch2jax(lambda a, out=None: a + 1, out_arg="out")
    try:
        result = f(X)
    except Torch2JaxError:
        return
    same(result, X + 1)


# --- static arguments ----------------------------------------------------------------------------


def test_static_arguments() -> None:
    def fn(a: torch.Tensor, n: int, mode: str = "mul") -> torch.Tensor:
        assert type(n) is int
        return a * n if mode == "mul" else a + n

    f = torch2jax(fn, static_argnums=1)
    same(f(X, 3), 3 * X)
    same(f(X, 3, "add"), X + 3)
    same(f(X, 2, mode="add"), X + 2)
    same(jax.jit(lambda a: f(a, 5))(X), 5 * X)
    same(jax.grad(lambda a: f(a, 5).sum())(X), np.full(4, 5.0))
    same(jax.vmap(lambda a: f(a, 5))(X), 5 * X)
    same(torch2jax(lambda a, n: a * n, static_argnums=-1)(X, 3), 3 * X)


def test_static_names_and_numbers_are_the_same_argument() -> None:
    """As in jax.jit: either option finds the argument by position and by keyword."""

    def fn(a: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return a.reshape(shape)

    by_name = torch2jax(fn, static_argnames="shape")
    by_number = torch2jax(fn, static_argnums=1)
    same(by_name(X, shape=(2, 2)), X.reshape(2, 2))
    same(by_number(X, (2, 2)), X.reshape(2, 2))
    same(by_name(X, (2, 2)), X.reshape(2, 2))
    same(by_number(X, shape=(2, 2)), X.reshape(2, 2))


@pytest.mark.parametrize("order", [(True, 1, 1.0), (1.0, True, 1), (1, 1.0, True)])
def test_static_values_that_compare_equal_are_told_apart(order: tuple[Any, ...]) -> None:
    scale = {bool: 2, int: 3, float: 5}
    f = torch2jax(lambda a, n: a * scale[type(n)], static_argnums=1)
    for value in order:
        same(f(X, value), X * scale[type(value)])
        same(jax.jit(lambda a, v=value: f(a, v))(X), X * scale[type(value)])


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


STATICS = [True, "text", b"bytes", None, torch.float64, torch.device("cpu"), torch.Size([2, 2]), Color.RED, Level.LOW,
           slice(0, 2), slice(None), range(3), ..., torch.strided, torch.contiguous_format]  # fmt: skip


@pytest.mark.parametrize("value", STATICS, ids=repr)
@pytest.mark.parametrize("place", ["position", "keyword", "nested"])
def test_types_that_are_static_by_themselves(value: Any, place: str) -> None:
    got: list[Any] = []

    def fn(a: torch.Tensor, option: Any) -> torch.Tensor:
        got.append(option["deep"][0] if place == "nested" else option)
        return a * 2

    f = torch2jax(fn)
    given = {"deep": [value]} if place == "nested" else value
    call = (lambda a: f(a, option=given)) if place == "keyword" else (lambda a: f(a, given))
    same(call(X), X * 2)
    same(jax.jit(call)(X), X * 2)
    same(jax.vmap(call)(X), X * 2)
    same(jax.grad(lambda a: call(a).sum())(X), np.full(4, 2.0))
    assert all(type(g) is type(value) and g == value for g in got)


def test_numbers_are_operands() -> None:
    f = torch2jax(lambda a, n, s: a * n + s)
    same(f(X, 2, 0.5), 2 * X + 0.5)
    same(jax.grad(lambda s: f(X, 2, s).sum())(0.5), 4.0)
    with pytest.raises(RuntimeError, match="static_argnums"):
        torch2jax(lambda a, n: a.reshape(n, n))(X, 2)


# --- side_effects, lock, name --------------------------------------------------------------------


def test_side_effects_are_neither_dropped_nor_merged() -> None:
    fn = Counted(lambda a: a + 1)
    f = torch2jax(fn, side_effects=True, output_shapes=Size([4]))

    @jax.jit
    def program(a: jax.Array) -> jax.Array:
        f(a)
        return f(a) + f(a)

    jax.block_until_ready(program(X))
    jax.effects_barrier()
    assert fn.calls == 3
    jax.block_until_ready(jax.jit(lambda a: (f(a), a)[1])(X))
    jax.effects_barrier()
    assert fn.calls == 4
    jax.block_until_ready(jax.lax.scan(lambda c, _: ((c, f(X))[0], None), 0.0, None, length=3))
    jax.effects_barrier()
    assert fn.calls == 7


def test_without_side_effects_an_unused_call_is_dropped() -> None:
    fn = Counted(lambda a: a + 1)
    f = torch2jax(fn, output_shapes=Size([4]))
    jax.block_until_ready(jax.jit(lambda a: (f(a), a)[1])(X))
    assert fn.calls == 0


def test_a_call_for_its_effect_alone() -> None:
    seen: list[float] = []
    f = torch2jax(lambda a: seen.append(a.sum().item()), side_effects=True)
    seen.clear()
    assert f(X) is None
    jax.effects_barrier()
    assert seen[-1:] == [X.sum()]
    seen.clear()
    jax.block_until_ready(jax.jit(lambda a: (f(a), a * 2)[1])(X))
    jax.effects_barrier()
    assert seen == [X.sum()]


def test_side_effects_under_transforms() -> None:
    f = torch2jax(lambda a: torch.sin(a), side_effects=True)
    same(jax.grad(lambda a: jax.checkpoint(f)(a).sum())(X), np.cos(X))
    same(jax.vmap(f)(X), np.sin(X))
    same(jax.lax.cond(True, f, f, X), np.sin(X))
    same(jax.jacfwd(f)(X), np.diag(np.cos(X)))


class Lock:
    def __init__(self) -> None:
        self.inside = 0
        self.entered = 0

    def __enter__(self) -> None:
        self.inside += 1
        self.entered += 1

    def __exit__(self, *_: object) -> None:
        self.inside -= 1


def test_lock_is_held_around_every_call() -> None:
    lock = Lock()
    held: list[int] = []

    def fn(a: torch.Tensor) -> torch.Tensor:
        held.append(lock.inside)
        return torch.sin(a)

    f = torch2jax(fn, lock=lock)
    same(f(X), np.sin(X))
    same(jax.jit(jax.grad(lambda a: f(a).sum()))(X), np.cos(X))
    same(jax.vmap(f)(X), np.sin(X))
    assert held
    assert all(h == 1 for h in held)
    assert lock.inside == 0


def test_lock_is_released_by_an_exception() -> None:
    lock = Lock()

    def fn(a: torch.Tensor) -> torch.Tensor:
        raise ValueError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        torch2jax(fn, lock=lock, output_shapes=Size([4]))(X)
    assert lock.inside == 0
    assert lock.entered == 1


def test_the_locks_of_threading() -> None:
    for lock in (threading.Lock(), threading.RLock(), True):
        f = torch2jax(lambda a: a * 2, lock=lock)
        same(f(X), 2 * X)
        same(jax.grad(lambda a, f=f: f(a).sum())(X), np.full(4, 2.0))


def test_the_process_lock_is_one_for_all() -> None:
    inside: list[str] = []

    def make(name: str) -> Any:
        def fn(a: torch.Tensor) -> torch.Tensor:
            inside.append(name)
            assert len(inside) == 1
            for _ in range(20):
                a = a + 0  # lets the other thread run
            inside.pop()
            return a

        return torch2jax(fn, lock=True)

    f, g = make("f"), make("g")

    def work(h: Any) -> None:
        for _ in range(30):
            jax.block_until_ready(h(X))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, (f, g, f, g)))


def test_the_same_wrap_is_the_same_object() -> None:
    def fn(a: torch.Tensor) -> torch.Tensor:
        return a

    f = torch2jax(fn)
    assert torch2jax(fn) is f
    assert torch2jax(fn, depth=1) is not f
    assert torch2jax(fn, depth=1) is torch2jax(fn, depth=1)
    g = torch2jax(fn, output_shapes=sds(4))
    assert torch2jax(fn, output_shapes=sds(4)) is g
    h = torch2jax(fn, static_argnums=0)
    assert torch2jax(fn, static_argnums=(0,)) is h
    assert torch2jax(lambda a: a) is not torch2jax(lambda a: a)
    module = torch.nn.Linear(2, 2)
    k = torch2jax(module.forward)
    assert torch2jax(module.forward) is k


def test_options_that_compare_equal_are_told_apart() -> None:
    fn = torch.abs
    wraps = [torch2jax(fn, sds(2), nondiff_mask=m) for m in (True, False)]
    assert wraps[0] is not wraps[1]
    assert torch2jax(fn, 1) is not torch2jax(fn, 1.0)


# --- vmap_method ---------------------------------------------------------------------------------

OWN = ("expand_dims", "broadcast_all", "legacy_vectorized")


@pytest.mark.parametrize("method", ["sequential", *OWN])
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (1, 0)])
def test_methods_mean_what_they_mean_in_pure_callback(
    method: str, axes: tuple[int | None, ...]
) -> None:
    """The function sees the shapes that a callback sees and gives the same result."""
    seen: dict[str, set[Any]] = {"ours": set(), "theirs": set()}

    def torch_fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen["ours"].add((tuple(a.shape), tuple(b.shape)))
        return a * 2 + b

    def callback(a: Any, b: Any) -> Any:
        seen["theirs"].add((a.shape, b.shape))
        return np.asarray(a * 2 + b, np.float32)

    f = torch2jax(torch_fn, output_shapes=Size([3]), vmap_method=method)
    g = lambda a, b: jax.pure_callback(callback, sds(3), a, b, vmap_method=method)  # noqa: E731
    rng = np.random.default_rng(0)
    args = [
        rng.normal(size=(3,) if d is None else (5, 3) if d == 0 else (3, 5)).astype(np.float32)
        for d in axes
    ]
    same(jax.vmap(f, axes)(*args), jax.vmap(g, axes)(*args))
    assert seen["ours"] == seen["theirs"]
    seen["ours"].clear()
    seen["theirs"].clear()
    nested = tuple(None if d is None else 0 for d in axes)
    args = [np.stack([a, a + 1]) if d is not None else a for a, d in zip(args, axes, strict=True)]
    twice = lambda h: jax.vmap(jax.vmap(h, axes), nested)  # noqa: E731
    same(twice(f)(*args), twice(g)(*args))
    assert seen["ours"] == seen["theirs"]


@pytest.mark.parametrize("method", ["auto", "torch", "sequential", "sequential_unrolled", *OWN])
def test_every_method_with_derivatives(method: str) -> None:
    f = torch2jax(lambda a, b: torch.sin(a) * b, vmap_method=method)
    twin = lambda a, b: jnp.sin(a) * b  # noqa: E731
    a, b = np.stack([X, 2 * X, 3 * X]), X
    same(jax.vmap(f, (0, None))(a, b), jax.vmap(twin, (0, None))(a, b))
    grad = lambda g: jax.vmap(jax.grad(lambda a, b: g(a, b).sum(), (0, 1)), (0, None))(a, b)  # noqa: E731
    same(grad(f), grad(twin))
    jac = lambda g: (jax.jacfwd(g, 1)(X, b), jax.jacrev(g, 0)(X, b))  # noqa: E731
    same(jac(f), jac(twin))
    outer = lambda g: jax.grad(lambda a, b: jax.vmap(g, (0, None))(a, b).sum(), (0, 1))(a, b)  # noqa: E731
    same(outer(f), outer(twin))


def test_auto_is_one_call() -> None:
    fn = Counted(lambda a: torch.sin(a))
    f = torch2jax(fn)
    rows = np.ones((6, 4), np.float32)
    run = jax.jit(jax.vmap(f))
    jax.block_until_ready(run(rows))
    before = fn.calls
    jax.block_until_ready(run(rows))
    assert fn.calls == before + 1


def test_auto_warns_once_and_loops() -> None:
    def refuses(a: torch.Tensor) -> torch.Tensor:
        if (a.sum() > 0).item():
            return torch.sin(a)
        return torch.cos(a)

    f = torch2jax(refuses, output_shapes=Size([4]))
    rows = np.stack([X, -X])
    with pytest.warns(Torch2JaxWarning, match="refuses.*(item|_local_scalar_dense)") as caught:
        out = jax.vmap(f)(rows)
    assert len(caught) == 1
    same(out, np.stack([np.sin(X), np.cos(-X)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.vmap(f)(np.stack([X, X, X]))
        same(jax.vmap(jax.grad(lambda a: f(a).sum()))(rows), np.stack([np.cos(X), -np.sin(-X)]))
        same(jax.jit(jax.vmap(jax.vmap(f)))(rows[None]), np.stack([np.sin(X), np.cos(-X)])[None])


def test_auto_does_not_depend_on_warning_filters() -> None:
    """torch warns of a slow batching rule; a user's filter must not choose between one call and a loop."""

    def slow(a: torch.Tensor, i: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return a.index_copy(0, i, row)

    f = torch2jax(slow, arg_dtypes={"i": torch.int64})
    a, i, rows = np.ones((3, 4), np.float32), np.array([1]), np.stack([X[None], 2 * X[None]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", Torch2JaxWarning)  # no loop
        warnings.simplefilter("error", UserWarning)
        out = jax.vmap(f, (None, None, 0))(a, i, rows)
    same(out, jax.vmap(lambda r: jnp.asarray(a).at[1].set(r[0]))(rows))


def test_torch_is_an_error_where_torch_cannot_batch() -> None:
    def refuses(a: torch.Tensor) -> torch.Tensor:
        return a * a.sum().item()

    f = torch2jax(refuses, vmap_method="torch")
    with pytest.raises(Torch2JaxError, match=r"refuses.*sequential"):
        jax.vmap(f)(np.stack([X, X]))
    same(f(X), X * X.sum())


@pytest.mark.parametrize("method", ["sequential", "sequential_unrolled"])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_sequential_calls_once_for_each_row(method: str, n: int) -> None:
    fn = Counted(lambda a: a * 2)
    f = torch2jax(fn, vmap_method=method, output_shapes=Size([4]))
    rows = np.ones((n, 4), np.float32)
    same(jax.vmap(f)(rows), rows * 2)
    assert fn.calls == n


def test_batches_of_nothing() -> None:
    f = torch2jax(lambda a: torch.sin(a))
    assert jax.vmap(f)(np.ones((0, 4), np.float32)).shape == (0, 4)
    assert jax.vmap(jax.grad(lambda a: f(a).sum()))(np.ones((0, 4), np.float32)).shape == (0, 4)


# --- types ---------------------------------------------------------------------------------------


def seen_dtypes() -> tuple[dict[str, torch.dtype], Any]:
    seen: dict[str, torch.dtype] = {}

    def fn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.update(a=a.dtype, b=b.dtype)
        return a * 1

    return seen, fn


@pytest.mark.parametrize(
    "given",
    [(torch.int64, None), [torch.int64, None], {"a": torch.int64}, torch.int64],
    ids=["tuple", "list", "name", "prefix"],
)
def test_arg_dtypes(given: Any) -> None:
    seen, fn = seen_dtypes()
    f = torch2jax(fn, arg_dtypes=given)
    out = f(np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32))
    assert seen["a"] is torch.int64
    assert seen["b"] is (torch.int64 if given is torch.int64 else torch.int32)
    assert out.dtype == jnp.int32


def test_arg_dtypes_of_floats_carry_gradients() -> None:
    seen, fn = seen_dtypes()
    f = torch2jax(fn, arg_dtypes=(torch.float64, None))
    same(jax.grad(lambda a: f(a, X).sum())(X), np.ones(4))
    same(jax.hessian(lambda a: (f(a, X) ** 2).sum())(X), 2 * np.eye(4))
    same(jax.vmap(f)(X, X), X)
    assert seen["a"] is torch.float64
    assert f(X, X).dtype == F32


@pytest.mark.parametrize(
    "example",
    [torch.arange(3), np.arange(3), jax.ShapeDtypeStruct((3,), np.int64)],
    ids=["tensor", "numpy", "struct"],
)
def test_64_bit_examples_with_x64_off(example: Any) -> None:
    seen, fn = seen_dtypes()
    f = torch2jax(fn, example, example)
    assert f(np.arange(3, dtype=np.int32), np.arange(3)).dtype == jnp.int32
    assert seen == {"a": torch.int64, "b": torch.int64}


def test_int32_is_what_fn_sees_otherwise() -> None:
    seen, fn = seen_dtypes()
    torch2jax(fn)(np.arange(3), np.arange(3))
    assert seen == {"a": torch.int32, "b": torch.int32}


def test_refused_int32_is_tried_again_as_int64_with_one_note() -> None:
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, labels)

    f = torch2jax(loss)
    logits, labels = (
        np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32),
        np.array([0, 2, 1, 1, 0]),
    )
    twin = lambda z: -jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], 1).mean()  # noqa: E731
    with pytest.warns(Torch2JaxWarning, match=r"args\[1\].*int64") as caught:
        out = f(logits, labels)
    assert len(caught) == 1
    same(out, twin(logits))
    same(jax.grad(f)(logits, labels), jax.grad(twin)(logits))
    same(
        f(logits[:2], labels[:2]), -jax.nn.log_softmax(logits[:2])[np.arange(2), labels[:2]].mean()
    )


def test_with_x64_on_nothing_changes_dtype() -> None:
    with precision(True):
        seen, fn = seen_dtypes()
        out = torch2jax(fn)(jnp.arange(3), jnp.ones(3))
        assert seen == {"a": torch.int64, "b": torch.float64}
        assert out.dtype == jnp.int64
        assert (
            torch2jax(fn)(jnp.ones(3, jnp.float32), jnp.arange(3, dtype=jnp.int32)).dtype
            == jnp.float32
        )
        assert seen == {"a": torch.float32, "b": torch.int32}
        labels = torch2jax(lambda i: torch.nn.functional.one_hot(i, 3))(jnp.arange(3))
        assert labels.dtype == jnp.int64


def test_x64_switched_between_calls() -> None:
    f = torch2jax(lambda a: (a.sum(), a.to(torch.float64)))
    for on in (False, True, False):
        with precision(on):
            total, wide = f(jnp.arange(3))
            assert total.dtype == (jnp.int64 if on else jnp.int32)
            assert wide.dtype == (jnp.float64 if on else jnp.float32)


def test_64_bit_results_with_x64_off() -> None:
    f = torch2jax(lambda a: (a.double(), a.long(), a.to(torch.complex128), a.argmax()))
    assert [o.dtype.name for o in f(X)] == ["float32", "int32", "complex64", "int32"]
    with pytest.raises(RuntimeError, match="jax_enable_x64"):
        jax.block_until_ready(torch2jax(lambda a: a.long() * 2**40)(X))
    same(jax.grad(lambda a: f(a)[0].sum())(X), np.ones(4))


# --- functions of all kinds ----------------------------------------------------------------------


class Adder:
    def __init__(self, w: float) -> None:
        self.w = torch.full((4,), w)

    def __call__(self, a: torch.Tensor) -> torch.Tensor:
        return a + self.w

    def method(self, a: torch.Tensor) -> torch.Tensor:
        return a + self.w

    @classmethod
    def of_class(cls, a: torch.Tensor) -> torch.Tensor:
        return a + 2

    @staticmethod
    def static(a: torch.Tensor) -> torch.Tensor:
        return a + 2


@torch.jit.script
def scripted(a: torch.Tensor) -> torch.Tensor:
    return a + 2


KINDS: dict[str, Any] = {
    "object": Adder(2),
    "bound": Adder(2).method,
    "classmethod": Adder.of_class,
    "staticmethod": Adder.static,
    "partial": functools.partial(torch.add, other=2),
    "partial of tensor": functools.partial(torch.add, torch.full((4,), 2.0)),
    "nested partial": functools.partial(functools.partial(lambda a, b, c: a + b + c, c=1), b=1),
    "builtin": lambda a: torch.ops.aten.add.Scalar(a, 2),
    "module": torch.nn.Sequential(
        torch.nn.Identity(), type("Add", (torch.nn.Module,), {"forward": lambda s, a: a + 2})()
    ),
    "scripted": scripted,
    "compiled": torch.compile(lambda a: a + 2, backend="eager"),
    "compiled with aot": torch.compile(lambda a: a + 2, backend="aot_eager"),
    "no_grad": torch.no_grad()(lambda a: a + 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_functions_of_all_kinds(kind: str) -> None:
    f = torch2jax(KINDS[kind])
    same(f(X), X + 2)
    same(jax.jit(f)(X), X + 2)
    slope = 0.0 if kind == "no_grad" else 1.0
    same(jax.grad(lambda a: f(a).sum())(X), np.full(4, slope))
    same(jax.jit(jax.jacrev(f))(X), slope * np.eye(4))
    assert isinstance(f.__name__, str)
    assert isinstance(repr(f), str)
    assert f.lower(sds(4)).as_text()


def test_many_arguments_and_results() -> None:
    f = torch2jax(lambda *xs: [x * i for i, x in enumerate(xs)])
    out = jax.jit(f)(*[X] * 200)
    same(out[7], X * 7)
    grads = jax.grad(lambda *xs: sum(o.sum() for o in f(*xs)), (0, 199))(*[X] * 200)
    same(grads, (np.zeros(4), np.full(4, 199.0)))
    same(jax.vmap(f)(*[X] * 200)[3], X * 3)


Point = collections.namedtuple("Point", "x y")


def test_trees() -> None:
    f = torch2jax(lambda p, d, n: (Point(p.y, p.x), {"z": [d["a"][0] * 2], "a": None}, [], n))
    out = f(Point(X, X + 1), {"a": (X,)}, None)
    assert type(out[0]) is Point
    same(out, (Point(X + 1, X), {"z": [X * 2], "a": None}, [], None))
    same(jax.jit(lambda p: f(p, {"a": (X,)}, None))(Point(X, X + 1))[0], Point(X + 1, X))


@pytest.mark.parametrize("transform", ["disable_jit", "nested_jit", "remat", "scan", "while"])
def test_in_programs(transform: str) -> None:
    def run(g: Any) -> Any:
        loss = lambda a: g(a).sum()  # noqa: E731
        if transform == "disable_jit":
            with jax.disable_jit():
                return g(X), jax.grad(loss)(X), jax.vmap(g)(X)
        if transform == "nested_jit":
            return jax.jit(lambda a: jax.jit(jax.jit(g))(a) + g(a))(X)
        if transform == "remat":
            return jax.grad(jax.checkpoint(lambda a: jax.checkpoint(g)(jnp.cos(a)).sum()))(X)
        if transform == "scan":
            inner = lambda c, xs: jax.lax.scan(lambda c, x: (g(c * x), c), c, xs)[0]  # noqa: E731
            return jax.vmap(jax.grad(inner))(X, np.stack([X] * 4))
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, g(s[1])), (0, X))[1]

    same(run(torch2jax(lambda a: torch.sin(a))), run(jnp.sin))


def test_concurrent_calls() -> None:
    f = torch2jax(lambda a, b: torch.sin(a) @ b)

    def work(i: int) -> None:
        a, b = np.full((4 + i % 3, 4), i, np.float32), np.ones((4, 2), np.float32)
        for _ in range(10):
            same(f(a, b), np.sin(a) @ b)
            same(jax.grad(lambda a: f(a, b).sum())(a), 2 * np.cos(a))

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("vmap_method", "loop"),
        ("depth", -1),
        ("depth", 1.5),
        ("residuals", "keep"),
        ("nondiff_argnums", 7),
        ("inplace_argnums", 7),
        ("arg_dtypes", {"nobody": torch.int64}),
        ("arg_dtypes", (np.float32,)),
        ("nondiff_mask", (True, True, True)),
        ("output_shapes", {"a": 3}),
    ],
)
def test_wrong_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(SignatureError, match=option):
        torch2jax(lambda a: a * 1, **{option: value})(X)


def test_no_context_is_left_open() -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.checking_leaks())
        f = torch2jax(lambda a: torch.sin(a))
        same(jax.jit(jax.grad(lambda a: f(a).sum()))(X), np.cos(X))
        same(jax.vmap(f)(X), np.sin(X))


@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev, jax.hessian, jax.vmap])
def test_declared_shapes_under_transforms(transform: Any) -> None:
    f = torch2jax(lambda a: torch.sin(a) * a, output_shapes=Size([4]))
    twin = lambda a: jnp.sin(a) * a  # noqa: E731
    if transform is jax.vmap:
        rows = jnp.stack([X, 2 * X])
        same(jax.vmap(jax.jacfwd(f))(rows), jax.vmap(jax.jacfwd(twin))(rows))
    else:
        same(transform(f)(X), transform(twin)(X))
