"""Functions that ask for values while they are traced: eager calls, both answers, examples, errors."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from torch2jax import SignatureError, TorchCallError, from_module, torch2jax

X = np.arange(1, 5, dtype=np.float32)
EYE = np.eye(3, dtype=np.float32) * 4


def if_any(x):
    return x * 2 if bool((x > 0).any()) else x * 3


def must_increase(x):
    assert (x[1:] > x[:-1]).all(), "not increasing"
    return x.cumsum(0)


def refuses_negative(x):
    if (x < 0).any():
        raise ValueError("negative")
    return x.sqrt()


def loop(x):
    while (x < 10).any():
        x = x * 2
    return x


def loop_with_assert(x):
    for _ in range(5):
        assert torch.isfinite(x).all()
        if x.sum() > 100:
            break
        x = x * 2
    return x


def scaled(x):
    return x / x.max().item()


def adaptive(x):
    step = 0.5 / x.abs().max().item()
    t = 0.0
    while t < 1:
        t += step
        x = x + step * torch.sin(x)
    return x


def jittered_cholesky(a):
    factor, info = torch.linalg.cholesky_ex(a)
    for k in range(3):
        if not torch.any(info):
            return factor
        a = a + 10 ** (k - 6) * torch.eye(a.shape[0])
        factor, info = torch.linalg.cholesky_ex(a)
    raise RuntimeError("not positive definite")


def equal_to_transposed(a):
    assert torch.equal(a, a.T)
    assert torch.allclose(a, a.T)
    return torch.linalg.inv(a)


def constants(x):
    """What does not depend on the operands has values."""
    assert torch.linspace(0, 1, 4).max().item() == 1
    table = torch.zeros(4)
    assert not table.any()
    table[:] = x
    assert table.any()
    return x * len(torch.arange(3).nonzero())


PROGRAMS = [
    (if_any, X),
    (must_increase, X),
    (refuses_negative, X),
    (loop, X),
    (loop_with_assert, X),
    (scaled, X),
    (adaptive, X),
    (jittered_cholesky, EYE),
    (equal_to_transposed, EYE),
    (constants, X),
]


def value(fn: Any, *args: Any) -> Any:
    return fn(*map(torch.from_numpy, args)).numpy()


@pytest.mark.parametrize(("fn", "x"), PROGRAMS, ids=lambda v: getattr(v, "__name__", ""))
def test_eager_compiled_and_differentiated(fn: Any, x: Any) -> None:
    want = value(fn, x)
    for wrap in (lambda f: f, jax.jit):
        f = torch2jax(lambda a: fn(a))
        np.testing.assert_allclose(wrap(f)(x), want, rtol=1e-5, atol=1e-6)
        leaf: Any = torch.from_numpy(x).requires_grad_()
        (fn(leaf) ** 2).sum().backward()
        f = torch2jax(lambda a: fn(a))
        grad = wrap(jax.grad(lambda a: (f(a) ** 2).sum()))(x)  # noqa: B023
        np.testing.assert_allclose(grad, leaf.grad, rtol=1e-4, atol=1e-4)


def placed_where_positive(x):
    chosen = torch.nn.functional.pad(x[x > 0][:, None].cumsum(0), (1, 0))
    return x.index_put(((x > 0).nonzero()[:, 0],), chosen.sum(-1))


@pytest.mark.parametrize("lower", [False, True], ids=["bridge", "lower"])
def test_a_size_that_depends_on_values_logs_nothing(
    lower: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Placed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return placed_where_positive(x)

    logger = logging.getLogger("torch")
    logger.addHandler(caplog.handler)  # PyTorch's loggers pass nothing on
    try:
        apply, variables = from_module(Placed(), lower=lower)
        out = jax.jit(apply)(variables, X - 2)
    finally:
        logger.removeHandler(caplog.handler)
    np.testing.assert_allclose(out, value(placed_where_positive, X - 2))
    assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_both_branches_run_with_one_trace() -> None:
    f = jax.jit(torch2jax(if_any))
    np.testing.assert_allclose(f(X), 2 * X)
    np.testing.assert_allclose(f(-X), -3 * X)
    with pytest.raises(jax.errors.JaxRuntimeError, match="not increasing"):
        jax.block_until_ready(jax.jit(torch2jax(must_increase))(X[::-1].copy()))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x[:1] if bool((x > 0).any()) else x,
        lambda x: x if (x > 0).all() else x.double(),
        lambda x: (x, x) if (x > 0).all() else x,
        lambda x: torch.zeros(int(x.sum())),
        lambda x: torch.zeros(int((x > 0).sum())),
        lambda x: x[: (x > 0).sum()],
    ],
    ids=["shape", "dtype", "structure", "float", "int", "slice"],
)
def test_answers_that_disagree_are_a_shape_that_depends_on_values(fn: Any) -> None:
    with pytest.raises(SignatureError, match="depends on the values"):
        jax.jit(torch2jax(fn))(X)


def test_an_eager_call_with_an_integer_that_makes_a_shape() -> None:
    for count in (np.int32(2), np.array([2], np.int32)):
        with pytest.raises(SignatureError, match="depends on the values"):
            torch2jax(lambda n: torch.zeros(int(n)))(count)


def count_of_image_tokens(ids, features):
    """As in vision-language models: the count is of tokens in the text, or of masked elements."""
    found = int((ids == 3).sum())
    if found != features.shape[0]:
        raise ValueError(f"{found} image tokens, {features.shape[0]} features")
    return into_places_of_image_tokens(ids, features)


def into_places_of_image_tokens(ids, features):
    embedded = torch.nn.functional.one_hot(ids.long(), 8).float()
    mask = (ids == 3)[:, None].expand_as(embedded)
    if embedded[mask].numel() != features.numel():
        raise ValueError("the number of features is another than that of image tokens")
    return embedded.masked_scatter(mask, features)


IDS, FEATURES = np.array([1, 3, 3, 2], np.int32), np.ones((2, 8), np.float32)


@pytest.mark.parametrize("fn", [count_of_image_tokens, into_places_of_image_tokens])
def test_counts_of_tokens_eagerly(fn: Any) -> None:
    want = value(fn, IDS, FEATURES)
    np.testing.assert_allclose(torch2jax(lambda *a: fn(*a))(IDS, FEATURES), want)


def test_sizes_that_depend_on_values_are_answered_too() -> None:
    f = torch2jax(lambda *a: into_places_of_image_tokens(*a))
    want = value(into_places_of_image_tokens, IDS, FEATURES)
    np.testing.assert_allclose(jax.jit(f)(IDS, FEATURES), want)
    grad = jax.jit(jax.grad(lambda x: (f(IDS, x) * np.arange(8)).sum()))(FEATURES)
    np.testing.assert_allclose(grad, np.tile(np.arange(8), (2, 1)))


def only_of(known: np.ndarray) -> Any:
    """A function of which nothing but its values tells the result."""

    def fn(x):
        if not np.array_equal(x.detach().numpy(), known):
            raise ValueError("other values")
        return x * 2

    return fn


def test_examples_and_eager_calls_have_values() -> None:
    np.testing.assert_allclose(torch2jax(only_of(X))(X), 2 * X)
    np.testing.assert_allclose(jax.jit(torch2jax(only_of(X), X))(X), 2 * X)
    f = torch2jax(only_of(X))
    f(X)
    np.testing.assert_allclose(jax.jit(f)(X), 2 * X)  # known from the call before


def rows_of(x, grid):
    """The sum of each group of columns; groups that do not fill the columns are an error."""
    return torch.stack([part.sum(-1) for part in x.split(grid.tolist(), -1)])


def test_operands_with_values_beside_others_that_are_traced() -> None:
    """JAX traces what it differentiates and maps; the rest of an eager call has values."""
    grid, x = jnp.array([2, 1, 3]), jnp.arange(12.0).reshape(2, 6)
    weights = jnp.array([[1.0, 2], [3, 4], [5, 6]])
    f = torch2jax(rows_of)
    grad = jax.grad(lambda x: (f(x, grid) * weights).sum())(x)
    np.testing.assert_array_equal(grad, np.repeat(weights.T, [2, 1, 3], axis=1))
    f = torch2jax(rows_of)
    ones = jax.jvp(lambda x: f(x, grid), (x,), (jnp.ones_like(x),))[1]
    np.testing.assert_array_equal(ones, [[2, 2], [1, 1], [3, 3]])
    f = torch2jax(rows_of, vmap_method="sequential")
    mapped = jax.vmap(lambda x: f(x, grid))(jnp.stack([x, 2 * x]))
    np.testing.assert_array_equal(mapped[1], 2 * f(x, grid))


def test_an_error_says_what_was_asked_where_and_what_helps() -> None:
    with pytest.raises(TorchCallError) as caught:
        jax.jit(torch2jax(only_of(X)))(X)
    text = str(caught.value)
    assert text.index("asks for values") < text.index("traced for args[0]: float32[4]")
    assert "test_questions.py, line" in text
    assert "if not np.array_equal(x.detach().numpy(), known):" in text
    assert "ValueError: other values" in text
    assert "torch2jax(fn, *examples)" in text
    assert "output_shapes=" in text


class Knows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

    def forward(self, x):
        if not np.array_equal(x.detach().numpy(), X):
            raise ValueError("other values")
        for layer in self.layers:
            x = layer(x)
        return x


def test_from_module_takes_examples() -> None:
    module = Knows()
    want = module(torch.from_numpy(X)).detach()
    for example in (X, jnp.asarray(X), torch.from_numpy(X)):
        apply, variables = from_module(module, example)
        np.testing.assert_allclose(jax.jit(apply)(variables, X), want, rtol=1e-5, atol=1e-6)
    apply, variables = from_module(module)
    np.testing.assert_allclose(apply(variables, X), want, rtol=1e-5, atol=1e-6)


def test_examples_of_a_module_may_be_trees_of_keywords() -> None:
    class Named(nn.Module):
        def forward(self, inputs, train):
            return inputs["x"] * train if inputs["x"].numpy()[0] == X[0] else None

    apply, variables = from_module(Named(), {"x": X}, np.float32(2), kwargs=True)
    np.testing.assert_allclose(jax.jit(apply)(variables, {"x": X}, np.float32(2)), 2 * X)


def test_an_int64_example_of_a_module_says_int64() -> None:
    class Takes(nn.Module):
        def forward(self, i):
            assert i.dtype is torch.int64
            return i * 2

    apply, variables = from_module(Takes(), torch.tensor([1, 2]))
    np.testing.assert_allclose(apply(variables, jnp.array([1, 2])), [2, 4])


def test_an_error_in_a_module_begins_with_its_cause() -> None:
    apply, variables = from_module(Knows())
    with pytest.raises(TorchCallError) as caught:
        jax.jit(apply)(variables, X)
    text = str(caught.value)
    assert text.startswith("Knows asks for values")
    assert "9 more" in text
    assert "args[1]: float32[4]" in text
    apply, variables = from_module(nn.Linear(3, 3))
    with pytest.raises(TorchCallError, match=r"^Linear raised RuntimeError when it was traced: "):
        apply(variables, X)


def test_integers_that_nothing_is_known_of_are_zeros() -> None:
    """As indices they are in range, where numpy needs values."""

    def fn(i, x):
        return torch.from_numpy(x.numpy()[i.numpy()])

    f = torch2jax(fn)
    np.testing.assert_allclose(jax.jit(f)(np.array([2, 1], np.int32), X), X[[2, 1]])


def selecting(way: str) -> Any:
    """Rows that a mask selects, as many as the text has tokens for; fake tensors cannot tell."""

    def fn(ids, mask, x):
        chosen = mask.numpy() > 0
        rows = {
            "mask": lambda: x[torch.from_numpy(chosen)],
            "count": lambda: x[: int(chosen.sum())],
            "indices": lambda: x.index_select(0, torch.from_numpy(np.flatnonzero(chosen))),
            "made": lambda: torch.ones(int(chosen.sum()), 4) * x.sum(),
        }[way]()
        if int((ids.numpy() == 3).sum()) != rows.shape[0]:
            raise ValueError("rows and tokens differ")
        return x * 2, rows

    return fn


@pytest.mark.parametrize("way", ["mask", "count", "indices", "made"])
def test_what_made_up_zeros_select_is_not_taken_for_the_shape(way: str) -> None:
    fn = selecting(way)
    mask, x = np.array([0, 1, 1, 0], np.int32), np.arange(16, dtype=np.float32).reshape(4, 4)
    f = torch2jax(lambda *args: fn(*args))
    with pytest.raises(TorchCallError, match=r"(?s)asks for values.*rows and tokens differ"):
        jax.jit(f)(IDS, mask, x)
    want = fn(*map(torch.from_numpy, (IDS, mask, x)))
    for got in (f(IDS, mask, x), jax.jit(f)(IDS, mask, x)):  # the call before has shown it
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b)
    grad = jax.jit(jax.grad(lambda x: (f(IDS, mask, x)[1] ** 2).sum()))(x)
    leaf: Any = torch.from_numpy(x).requires_grad_()
    fn(torch.from_numpy(IDS), torch.from_numpy(mask), leaf)[1].square().sum().backward()
    np.testing.assert_allclose(grad, leaf.grad)


def test_an_empty_result_that_no_value_decides_is_inferred() -> None:
    def fn(ids, x):
        return torch.from_numpy(x.numpy()[ids.numpy()]), x.new_zeros(0)

    got = jax.jit(torch2jax(fn))(np.array([2, 1], np.int32), X)
    np.testing.assert_allclose(got[0], X[[2, 1]])
    assert got[1].shape == (0,)


def test_a_loop_that_no_answer_ends_is_left() -> None:
    def fn(x):
        while x.max().item() < 100:
            x = x + 1
        return x

    np.testing.assert_allclose(torch2jax(fn)(X), value(fn, X))
    np.testing.assert_allclose(jax.jit(torch2jax(fn))(X), value(fn, X))
