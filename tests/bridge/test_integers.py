"""PyTorch's int64 that JAX carries as int32: indices, labels and counters reach operators as int64."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import precision
from op_exceptions import UNDEFINED_VALUES
from op_samples import op_db, results, to_numpy
from torch.utils import _pytree as torch_tree
from torch.utils._python_dispatch import TorchDispatchMode

from torch2jax import Torch2JaxWarning, device, from_module, torch2jax
from torch2jax._bridge.torch_side.integers import _PROVEN

EDGES = jnp.array([0, 0, 1, 1, 0])
COUNT = torch.arange(5, dtype=torch.int32)
NODES = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def rows(index: torch.Tensor) -> torch.Tensor:
    return index[:, None].expand(-1, 3)


# What graph networks are made of. Each is a function of 5 rows and their segments.
SEGMENT_FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "gather": lambda x, b: x[:2].gather(0, rows(b)),
    "gather, strided": lambda x, b: x[:2].gather(0, torch.stack([b, b, b], 1)[:, ::1]),
    "gather of sums": lambda x, b: x.gather(0, rows(2 * b + 1)),
    "scatter": lambda x, b: x.new_zeros(10, 3).scatter(0, rows(b + 2 * COUNT), x),
    "scatter_add": lambda x, b: x.new_zeros(2, 3).scatter_add(0, rows(b), x),
    "scatter_add, empty": lambda x, b: x.new_zeros(2, 3).scatter_add(0, rows(b[:0]), x[:0]),
    "scatter, empty": lambda x, b: x.scatter(0, rows(b[:0]), x[:0]),
    "scatter_reduce, empty": lambda x, b: x.scatter_reduce(0, rows(b[:0]), x[:0], "amax"),
    "index_add, empty": lambda x, b: x.index_add(0, b[:0], x[:0]),
    "index_copy, empty": lambda x, b: x.index_copy(0, b[:0], x[:0]),
    "index_fill, empty": lambda x, b: x.index_fill(0, b[:0], 2.0),
    "index_reduce, empty": lambda x, b: x.index_reduce(0, b[:0], x[:0], "mean"),
    "index_put, empty": lambda x, b: x.index_put((b[:0],), x[:0], accumulate=True),
    "put, empty": lambda x, b: x.put(b[:0], x[:0, 0]),
    "index_select, empty": lambda x, b: x + x.index_select(0, b[:0]).sum(),
    "gather, empty": lambda x, b: x + x.gather(0, rows(b[:0])).sum(),
    "take, empty": lambda x, b: x + x.take(b[:0]).sum(),
    "embedding, empty": lambda x, b: x + F.embedding(b[:0], x).sum(),
    "nll_loss, empty": lambda x, b: x + F.nll_loss(x[:0], b[:0], reduction="sum"),
    "cross_entropy, empty": lambda x, b: x + F.cross_entropy(x[:0], b[:0], reduction="sum"),
    **{
        f"scatter_reduce {how}": (
            lambda x, b, how=how: x.new_ones(2, 3).scatter_reduce(0, rows(b), x, how)
        )
        for how in ("sum", "prod", "mean", "amax", "amin")
    },
    "index_add": lambda x, b: x.new_zeros(2, 3).index_add(0, b, x),
    "index_reduce": lambda x, b: x.new_ones(2, 3).index_reduce(0, b, x, "mean"),
    "index_select": lambda x, b: x.index_select(0, b),
    "index_select, expanded": lambda x, b: x.index_select(0, b[1:2].expand(4)),
    "index_put": lambda x, b: x.new_zeros(2, 3).index_put((b,), x, accumulate=True),
    "index": lambda x, b: x[b] * x[b.flip(0)],
    "embedding": lambda x, b: F.embedding(rows(b), x),
    "embedding_bag": lambda x, b: F.embedding_bag(rows(b), x),
    "sparse embedding": lambda x, b: F.embedding(rows(b), x, sparse=True),
    "take": lambda x, b: x.take(b),
    "nll_loss": lambda x, b: F.nll_loss(x, b, reduction="none"),
    "bincount": lambda x, b: torch.bincount(b, minlength=2)[:2].float() @ x[:2],
    "searchsorted": lambda x, b: x[torch.searchsorted(torch.arange(3), b)],
}


NOT_LOWERED = {"bincount": "the size of its result depends on values"}
NOT_BATCHED = {"scatter_reduce prod", "bincount", "embedding_bag"}
"""PyTorch has no batching rule, or no forward mode, for their derivatives."""
CASES = [(name, False) for name in SEGMENT_FUNCTIONS] + [
    (name, True) for name in SEGMENT_FUNCTIONS if name not in NOT_LOWERED
]


@pytest.mark.filterwarnings("ignore:.*(in beta|performance drop|torch.jit.script)")
@pytest.mark.parametrize(
    ("name", "lower"), CASES, ids=[f"{n}-{'lower' if lower else 'bridge'}" for n, lower in CASES]
)
def test_indices_are_read_right(name: str, lower: bool) -> None:
    """Values, gradients, tangents and batches. No note: notes are errors here."""
    fn = SEGMENT_FUNCTIONS[name]
    f = torch2jax(fn, lower=lower)

    def torch_side(x: torch.Tensor, b: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        x = x.clone().requires_grad_()
        out = fn(x, b)
        [gradient] = torch.autograd.grad((out * weights(out)).sum(), x)
        return out.detach().numpy(), gradient.to_dense().numpy()

    def weights(out: Any) -> Any:
        values = np.linspace(1, 2, int(np.prod(out.shape)), dtype=np.float32).reshape(out.shape)
        return torch.from_numpy(values) if isinstance(out, torch.Tensor) else values

    x, b = torch.from_numpy(NODES), torch.from_numpy(np.array(EDGES)).long()
    value, gradient = torch_side(x, b)

    def loss(x: jax.Array, b: jax.Array) -> jax.Array:
        out = f(x, b)
        return (out * weights(out)).sum()

    np.testing.assert_allclose(f(NODES, EDGES), value, rtol=1e-5)
    for run in (jax.grad(loss), jax.jit(jax.grad(loss))):
        np.testing.assert_allclose(run(NODES, EDGES), gradient, rtol=1e-4, atol=1e-5)
    if name in NOT_BATCHED and not lower:
        return
    pushed = jax.jvp(lambda x: loss(x, EDGES), (NODES,), (np.ones_like(NODES),))[1]
    np.testing.assert_allclose(pushed, gradient.sum(), rtol=1e-4, atol=1e-4)
    many_x, many_b = jnp.stack([NODES, 2 * NODES]), jnp.stack([EDGES, EDGES[::-1]])
    pairs = [
        torch_side(torch.from_numpy(np.array(x)), torch.from_numpy(np.array(b)).long())
        for x, b in zip(many_x, many_b, strict=True)
    ]
    np.testing.assert_allclose(jax.vmap(f)(many_x, many_b), [v for v, _ in pairs], rtol=1e-5)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(jax.grad(loss)))(many_x, many_b),
        [g for _, g in pairs],
        rtol=1e-4,
        atol=1e-5,
    )


def dtype_seen(*options_of: Any, **options: Any) -> Callable[..., set[torch.dtype]]:
    """A function that tells in which dtypes a wrapped ``fn`` gets its second argument."""

    def ask(fn: Callable[..., Any], *args: Any) -> set[torch.dtype]:
        seen: set[torch.dtype] = set()

        def watched(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            seen.add(b.dtype)
            return fn(x, b)

        f = torch2jax(watched, *options_of, **options)
        f(*args)
        seen.clear()  # the trace tried what it wanted
        jax.block_until_ready(f(*args))
        return seen

    return ask


PROVEN: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "arithmetic": lambda x, b: x * (2 * b + 1)[:, None] % 3,
    "comparison": lambda x, b: torch.where((b > 0)[:, None], x, 0),
    "cast": lambda x, b: x[:2].gather(0, rows(b.long())),
    "views": lambda x, b: x * torch.cat([b.view(5, 1), b[:, None]], 1).flip(0).sum(1)[:, None],
    "lookup": lambda x, b: F.embedding(b, x) + x[b],
    "mask": lambda x, b: x.masked_fill(b.bool()[:, None], 0.0),
}


@pytest.mark.parametrize("name", list(PROVEN))
def test_proven_operators_get_int32(name: str) -> None:
    assert dtype_seen()(PROVEN[name], NODES, EDGES) == {torch.int32}


@pytest.mark.parametrize("name", ["gather", "gather of sums", "nll_loss", "bincount"])
def test_other_operators_get_int64(name: str) -> None:
    assert dtype_seen()(SEGMENT_FUNCTIONS[name], NODES, EDGES) == {torch.int64}


def test_a_number_that_int32_does_not_hold_is_compared_right() -> None:
    fn = lambda x, b: x * ((b * 2654435761) % 1000)[:, None]  # noqa: E731
    b = np.array([0, 1, 2, 3, 40_000])
    expected = NODES * ((b * 2654435761) % 1000)[:, None]
    np.testing.assert_allclose(torch2jax(fn)(NODES, b), expected, rtol=1e-6)


def test_only_what_needs_it_is_widened() -> None:
    seen: dict[str, torch.dtype] = {}

    def fn(x: torch.Tensor, b: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        seen.update(b=b.dtype, n=n.dtype)
        return x[:2].gather(0, rows(b)) * n

    torch2jax(fn)(NODES, EDGES, jnp.array(2))
    assert seen == {"b": torch.int64, "n": torch.int32}


def test_bits_keep_their_dtype() -> None:
    """``view(dtype)`` reads an operand's bits: 64 of them would be another array."""
    fn = lambda x, b: x + b.view(torch.float32)[:, None] + x[:1].gather(0, rows(b * 0))  # noqa: E731
    bits = np.arange(1.0, 6.0, dtype=np.float32)
    expected = NODES + bits[:, None] + NODES[:1]
    for lower in (False, True):
        np.testing.assert_allclose(
            torch2jax(fn, lower=lower)(NODES, jnp.array(bits.view(np.int32))), expected, rtol=1e-6
        )


def test_int32_beside_int32_of_the_function_stays() -> None:
    """A function that updates a tensor of int32 means int32."""
    fn = lambda b: torch.zeros(2, dtype=torch.int32).scatter_add(0, b.long(), b)  # noqa: E731
    for lower in (False, True):
        np.testing.assert_array_equal(torch2jax(fn, lower=lower)(EDGES), [0, 2])


@pytest.mark.parametrize(
    ("examples", "options", "expected"),
    [
        ((), {}, torch.int64),
        ((), {"arg_dtypes": {"b": torch.int32}}, torch.int32),
        ((torch.ones(5, 3), torch.zeros(5, dtype=torch.int32)), {}, torch.int32),
        ((NODES, EDGES), {}, torch.int64),
        ((), {"output_shapes": jax.ShapeDtypeStruct((5, 3), np.float32)}, torch.int64),
        (
            (),
            {
                "output_shapes": jax.ShapeDtypeStruct((5, 3), np.float32),
                "arg_dtypes": {"b": torch.int32},
            },
            torch.int32,
        ),
    ],
    ids=["inferred", "arg_dtypes", "tensor", "array", "declared", "declared and arg_dtypes"],
)
def test_options_decide_first(examples: Any, options: Any, expected: torch.dtype) -> None:
    fn = lambda x, b: x.index_select(0, b)  # noqa: E731
    assert dtype_seen(*examples, **options)(fn, NODES, EDGES) == {expected}


def test_declared_results_with_indices() -> None:
    f = torch2jax(
        SEGMENT_FUNCTIONS["gather"], output_shapes=jax.ShapeDtypeStruct((5, 3), np.float32)
    )
    np.testing.assert_allclose(f(NODES, EDGES), NODES[np.asarray(EDGES)])


def test_indices_with_x64_on_are_what_the_caller_says() -> None:
    with precision(True):
        f = torch2jax(SEGMENT_FUNCTIONS["gather"])
        np.testing.assert_allclose(f(NODES, jnp.array(EDGES, jnp.int64)), NODES[np.array(EDGES)])


def test_operators_of_libraries() -> None:
    """They get int64, unless they refuse it and run on int32: as FlashAttention's lengths do."""
    name = "t2j_integers"

    def rows_of(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return x.gather(0, rows(b))  # that gather is not seen from outside

    def strict(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if b.dtype is not torch.int32:
            raise RuntimeError("lengths must be int32")
        return x * b[:, None]

    indices = torch.library.custom_op(
        f"{name}::rows", mutates_args=(), schema="(Tensor x, Tensor b) -> Tensor"
    )(rows_of)
    indices.register_fake(lambda x, b: x.new_empty(b.shape[0], 3))
    lengths = torch.library.custom_op(
        f"{name}::lengths", mutates_args=(), schema="(Tensor x, Tensor b) -> Tensor"
    )(strict)
    lengths.register_fake(lambda x, b: torch.empty_like(x))
    found = torch2jax(lambda x, b: indices(x[:2].contiguous(), b))(NODES, EDGES)
    np.testing.assert_allclose(found, NODES[np.asarray(EDGES)])
    found = torch2jax(lambda x, b: lengths(x, b))(NODES, EDGES)
    np.testing.assert_allclose(found, NODES * np.asarray(EDGES)[:, None])


REFUSED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "take_along_dim": lambda x, b: torch.take_along_dim(x, rows(b), 0),
    "one_hot": lambda x, b: F.one_hot(b, 2).float().T @ x,
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_refuses_int32_before_an_operator_runs(name: str) -> None:
    fn = REFUSED[name]
    expected = fn(torch.from_numpy(NODES), torch.from_numpy(np.array(EDGES)).long()).numpy()
    with pytest.warns(Torch2JaxWarning, match=r"args\[1\] reach it as int64"):
        found = torch2jax(fn)(NODES, EDGES)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(torch2jax(fn, lower=True)(NODES, EDGES), expected, rtol=1e-5)


class GraphLayer(torch.nn.Module):
    """Messages along edges, summed at their ends: a graph network's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.kind = torch.nn.Embedding(4, 3)

    def forward(self, x: torch.Tensor, edges: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        x = self.linear(x) + self.kind(kinds)
        messages = x.gather(0, edges[0, :, None].expand(-1, x.shape[1]))
        ends = edges[1, :, None].expand_as(messages)
        return torch.zeros_like(x).scatter_reduce(0, ends, messages, "amax", include_self=False)


@pytest.mark.parametrize("lower", [False, True], ids=["bridge", "lower"])
def test_a_module_with_indices(lower: bool) -> None:
    torch.manual_seed(0)
    layer = GraphLayer()
    edges = np.array([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 3]])
    kinds = np.array([0, 1, 3, 2, 0])
    out = layer(torch.from_numpy(NODES), torch.from_numpy(edges), torch.from_numpy(kinds))
    (out**2).sum().backward()
    apply, variables = from_module(layer, lower=lower)
    loss = lambda v, e, k: (apply(v, NODES, e, k) ** 2).sum()  # noqa: E731
    np.testing.assert_allclose(
        apply(variables, NODES, edges, kinds), out.detach().numpy(), rtol=1e-5, atol=1e-6
    )
    for run in (jax.grad(loss), jax.jit(jax.grad(loss))):
        found = run(variables, edges, kinds)["params"]
        for name, p in layer.named_parameters():
            assert p.grad is not None
            np.testing.assert_allclose(found[name], p.grad.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_counting_on_the_device(dtype: torch.dtype) -> None:
    """PyTorch's CPU kernel of ``histc`` takes no integers; those of accelerators do."""
    device.enable()
    x = torch.tensor([0, 1, 1, 3, 7], dtype=dtype)
    expected = torch.histc(x.double(), bins=4, min=0, max=3)
    found = torch.histc(x.to("jax"), bins=4, min=0, max=3)
    assert found.dtype is dtype
    np.testing.assert_array_equal(found.cpu().numpy(), expected.numpy())
    count = lambda x: torch.histc(x.to(dtype), bins=4, min=0, max=3)  # noqa: E731
    f = torch2jax(count, lower=True)
    for run in (f, jax.jit(f)):
        np.testing.assert_array_equal(run(jnp.array([0, 1, 1, 3, 7])), expected.numpy())


def test_bridged_operators_of_the_device_get_int64() -> None:
    """An operator without a lowering, with an index that stands for int64."""
    device.enable()
    x, index = torch.randn(5, 3), torch.tensor([[0, 1, 0], [1, 4, 2]])
    expected = x.put(index, torch.ones(2, 3))
    found = x.to("jax").put(index.to("jax"), torch.ones(2, 3).to("jax"))
    np.testing.assert_allclose(found.cpu().numpy(), expected.numpy())


# --- which operators are proven ------------------------------------------------------------------


class Names(TorchDispatchMode):
    """Notes the names of the operators that run on tensors of int64."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = torch_tree.tree_leaves((args, kwargs))
        if any(isinstance(x, torch.Tensor) and x.dtype is torch.int64 for x in given):
            self.found.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def layouts(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor in other layouts; the last ones have other values, too."""
    yield x
    yield torch.stack([x, x + 1], -1).select(-1, 0)
    if x.ndim > 1:
        yield x.transpose(0, 1).contiguous().transpose(0, 1)
    if x.ndim:
        yield x[..., :1].expand(x.shape)


def in_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of x as another dtype, with the strides of x."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return storage.to(dtype, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())


def in_int32(x: torch.Tensor) -> torch.Tensor:
    return in_dtype(x, torch.int32)


def same_in_int32(call: Callable[[Any], Any], given: Any) -> bool | None:
    """Whether a call of tensors of int64 gives the same for int32; None where torch runs neither."""

    def given_as(dtype: torch.dtype) -> Any:
        return torch_tree.tree_map(
            lambda x: (
                in_dtype(x, dtype if x.dtype is torch.int64 else x.dtype)
                if isinstance(x, torch.Tensor)
                else x
            ),
            given,
        )

    try:
        expected = [to_numpy(x) for x in results(call(given_as(torch.int64)))]
    except Exception:
        return None
    if any(x.dtype == np.int64 and np.abs(x).max(initial=0) >= 2**31 for x in expected):
        return None
    found = results(call(given_as(torch.int32)))
    return all(
        np.allclose(to_numpy(a), b, rtol=1e-5, equal_nan=True)
        for a, b in zip(found, expected, strict=True)
    )


LEFT_OUT = UNDEFINED_VALUES | {"tensor_split"}
"""The latter refuses int32 before an operator runs: inference is then tried again with int64."""

UNTESTED = {
    **dict.fromkeys(("_reshape_alias", "alias", "detach"), "views that no sample makes"),
    **dict.fromkeys(("empty_like", "new_empty_strided"), "they read no element"),
    "embedding": "below",
}
"""Operators of the list that no sample of int64 reaches."""


def test_proven_operators_read_int32_right() -> None:
    """PyTorch's own samples: where only proven operators run, int32 gives what int64 gives."""
    covered: set[str] = set()
    wrong: list[str] = []
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about deprecated operators
        for op in op_db:
            if torch.int64 not in op.supported_dtypes("cpu") or op.name in LEFT_OUT:
                continue
            for call in filter(None, (op.op, op.inplace_variant)):
                for sample in itertools.islice(op.sample_inputs("cpu", torch.int64), 4):
                    given = (sample.input, *sample.args)
                    names = Names()
                    try:
                        with names:
                            call(*copies(given), **sample.kwargs)
                    except Exception:
                        continue  # torch itself cannot run it
                    if not names.found or names.found - _PROVEN:
                        break
                    covered |= names.found
                    wrong += mismatches(op.formatted_name, call, given, sample.kwargs)
    assert not wrong, "\n".join(wrong[:20])
    assert _PROVEN - covered == set(UNTESTED)


def copies(given: Any) -> Any:
    return torch_tree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, given)


def mismatches(name: str, call: Any, given: Any, kwargs: Any) -> list[str]:
    found = []
    tensors = [x for x in torch_tree.tree_leaves(given) if isinstance(x, torch.Tensor)]
    for k in range(max(len(list(layouts(x))) for x in tensors)):

        def laid_out(x: Any, k: int = k) -> Any:
            if not isinstance(x, torch.Tensor) or x.dtype is not torch.int64:
                return x
            ways = list(layouts(x))
            return ways[k % len(ways)]

        arguments = torch_tree.tree_map(laid_out, given)
        if same_in_int32(lambda xs: call(*xs, **kwargs), arguments) is False:
            found.append(f"{name}, layout {k}, {[getattr(x, 'shape', x) for x in given]} {kwargs}")
    return found


@pytest.mark.parametrize("lookup", ["embedding", "index"])
@pytest.mark.parametrize("size", [6, 3000])
def test_lookups_read_int32_right(lookup: str, size: int) -> None:
    """With their gradients, second gradients, tangents and batches, small and large."""
    torch.manual_seed(0)
    fn: Any = F.embedding if lookup == "embedding" else lambda i, w: w[i]
    table, index = torch.randn(size, 8), torch.randint(size, (size // 2, 4))

    def gradient(i: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda w: (fn(i, w) ** 3).sum())(w)

    def second(i: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda w: (gradient(i, w) ** 2).sum())(w)

    def autograd(i: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        w = w.clone().requires_grad_()
        return torch.autograd.grad((fn(i, w) ** 3).sum(), w)[0]

    def pushed(i: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(lambda w: fn(i, w), (w,), (w,))[1]

    forms = [fn, gradient, second, autograd, pushed]
    several = [torch.vmap(f, in_dims) for f in (fn, gradient, pushed) for in_dims in ((0, None), 0)]
    for i in [*layouts(index), index[:0]]:
        for form in forms:
            if form is second and not i.numel():
                continue  # PyTorch itself cannot
            torch.testing.assert_close(form(in_int32(i), table), form(i, table))
        for n, batched in enumerate(several):
            tables = table if n % 2 == 0 else torch.stack([table, -table])
            pair = torch.stack([i, i.flip(0)])
            torch.testing.assert_close(batched(in_int32(pair), tables), batched(pair, tables))
