"""Random numbers: keys, masks that forward and backward share, torch's own generator left alone."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from torch2jax import (
    SignatureError,
    Torch2JaxWarning,
    clear_tape,
    set_tape_budget,
    tape_info,
    torch2jax,
)

ERRORS = (jax.errors.JaxRuntimeError, RuntimeError, ValueError)
P = 0.25
N = 64


@pytest.fixture(autouse=True)
def generator_untouched() -> Iterator[None]:
    """Calls with a key leave torch's generator as it was."""
    clear_tape()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)
    set_tape_budget(None)
    clear_tape()


@pytest.fixture
def x() -> jax.Array:
    return jnp.linspace(1.0, 2.0, N)


def dropout(x):
    return F.dropout(x, P) * 1.0


def checkpointed(x):
    return checkpoint(lambda t: F.dropout(t, P) * 1.0, x, use_reentrant=False)


def reentrant(x):
    return checkpoint(lambda t: F.dropout(t, P) * 1.0, x, use_reentrant=True)


def held(x):
    class Held(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mask = (torch.rand_like(x) > P) / (1 - P)
            ctx.x = x
            return x * ctx.mask

        @staticmethod
        def backward(ctx, c):
            return c * ctx.mask * ctx.x / ctx.x

    return Held.apply(x)


FUNCTIONS = {"plain": dropout, "checkpoint": checkpointed, "reentrant": reentrant, "held": held}
OPTIONS: dict[str, dict[str, Any]] = {
    "tape": {},
    "recompute": {"residuals": "recompute"},
    "depth": {"depth": 1},
    "depth_recompute": {"depth": 1, "residuals": "recompute"},
}


def is_mask(m: Any) -> None:
    """Zeros and 1 / (1 - p), both there."""
    m = np.asarray(m)
    kept = m != 0
    np.testing.assert_allclose(m[kept], 1 / (1 - P), 1e-5)
    assert 0.03 < 1 - kept.mean() < 0.6


def own_mask(y: Any, g: Any, x: Any) -> None:
    """The gradient of sum(dropout(x)) is the mask of its own forward pass."""
    is_mask(np.asarray(y) / np.asarray(x))
    np.testing.assert_allclose(np.asarray(g), np.asarray(y) / np.asarray(x), 1e-5, 1e-6)


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        warnings.simplefilter("ignore", Torch2JaxWarning)
        yield


def with_output(f: Callable[..., Any]) -> Callable[..., Any]:
    def loss(x, *key):
        y = f(x, rng=key[0]) if key else f(x)
        return y.sum(), y

    return jax.grad(loss, has_aux=True)


# --- with a key --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.usefixtures("quiet")
def test_gradient_is_the_mask_of_its_own_forward(x, name, options, budget):
    set_tape_budget(budget)
    f = torch2jax(FUNCTIONS[name], stochastic=True, **OPTIONS[options])
    key = jax.random.key(7)
    step = with_output(f)
    plain = f(x, rng=key)
    outs = []
    for run in (step, jax.jit(step)):
        g, y = run(x, key)
        own_mask(y, g, x)
        np.testing.assert_array_equal(y, plain)
        outs.append(y)

    def scanned(x, keys):
        return jax.lax.scan(lambda c, k: (c, step(x, k)), 0, keys)[1]

    keys = jax.random.split(key, 5)
    gs, ys = jax.jit(scanned)(x, keys)
    for k in range(5):
        own_mask(ys[k], gs[k], x)
        np.testing.assert_array_equal(ys[k], f(x, rng=keys[k]))
    gs, ys = jax.vmap(step, (None, 0))(x, keys)
    for k in range(5):
        own_mask(ys[k], gs[k], x)
        np.testing.assert_array_equal(ys[k], f(x, rng=keys[k]))
    remat = jax.checkpoint(lambda x, k: f(x, rng=k))
    g, y = jax.jit(with_output(lambda x, rng: remat(x, rng)))(x, key)
    own_mask(y, g, x)
    assert tape_info().entries == 0


@pytest.mark.parametrize("options", ["tape", "recompute"])
def test_gradient_through_a_scan(x, options):
    """The carry goes through three masks: the gradient is their product."""
    f = torch2jax(dropout, stochastic=True, **OPTIONS[options])
    keys = jax.random.split(jax.random.key(1), 3)

    def loss(x):
        y, _ = jax.lax.scan(lambda c, k: (f(c, rng=k), None), x, keys)
        return y.sum(), y

    for wrap in (lambda f: f, jax.checkpoint):
        g, y = jax.jit(jax.grad(wrap(loss), has_aux=True))(x)
        np.testing.assert_allclose(g, y / x, 1e-5)
        assert 0 < int((y == 0).sum()) < N


def test_same_key_same_numbers_everywhere(x):
    f = torch2jax(dropout, stochastic=True)
    key = jax.random.key(3)
    y = f(x, rng=key)
    same = [
        f(x, rng=key),
        jax.jit(lambda x, k: f(x, rng=k))(x, key),
        jax.jit(lambda x: f(x, rng=key))(x),
        jax.vmap(lambda k: f(x, rng=k))(key[None])[0],
        jax.lax.map(lambda k: f(x, rng=k), key[None])[0],
        jax.checkpoint(lambda x: f(x, rng=key))(x),
        f(x, rng=jax.random.key_data(key)),
        f(x, rng=jax.random.PRNGKey(3)),
        torch2jax(dropout, x, stochastic=True, name="other")(x, rng=key),
        jax.jvp(lambda x: f(x, rng=key), (x,), (x,))[0],
        jax.linearize(lambda x: f(x, rng=key), x)[0],
        jax.vjp(lambda x: f(x, rng=key), x)[0],
    ]
    torch.randn(3)  # whatever torch's own generator is at
    torch.manual_seed(0)
    same.append(f(x, rng=key))
    for other in same:
        np.testing.assert_array_equal(other, y)
    for other in (jax.random.key(4), jax.random.key(3 + 2**31), jax.random.fold_in(key, 1)):
        assert not np.array_equal(f(x, rng=other), y)


def test_keys_differ_in_every_word(x):
    f = torch2jax(lambda x: torch.rand_like(x), stochastic=True)
    words = [(0, 0), (0, 1), (1, 0), (1, 1), (2**32 - 1, 0), (0, 2**32 - 1), (2, 0), (0, 2)]
    rows = [np.asarray(f(x, rng=jnp.array(w, jnp.uint32))) for w in words]
    assert len({r.tobytes() for r in rows}) == len(words)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_kinds_of_keys(x, impl):
    f = torch2jax(dropout, stochastic=True)
    key = jax.random.key(0, impl=impl)
    g, y = jax.jit(with_output(f))(x, key)
    own_mask(y, g, x)
    np.testing.assert_array_equal(y, f(x, rng=jax.random.key_data(key)))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"rng": 3},
        {"rng": jnp.ones(2)},
        {"rng": jax.random.split(jax.random.key(0), 3)},
        {"rng": jax.random.split(jax.random.PRNGKey(0), 3)},
    ],
    ids=["none", "int", "float", "batch", "raw_batch"],
)
def test_bad_keys(x, given):
    f = torch2jax(dropout, stochastic=True)
    with pytest.raises((SignatureError, TypeError), match="rng"):
        f(x, **given)


def test_batched_keys_and_shared_keys(x):
    f = torch2jax(lambda x: x * (torch.rand_like(x) + 1), stochastic=True)
    rows = jnp.stack([x, 2 * x, 3 * x])
    keys = jax.random.split(jax.random.key(0), 3)
    shared = jax.vmap(lambda r: f(r, rng=keys[0]))(rows)
    np.testing.assert_allclose(shared[1], 2 * shared[0], 1e-6)
    np.testing.assert_allclose(shared[0], f(x, rng=keys[0]), 1e-6)
    own = jax.vmap(lambda r, k: f(r, rng=k))(rows, keys)
    for k in range(3):
        np.testing.assert_allclose(own[k], f(rows[k], rng=keys[k]), 1e-6)
    table = jax.vmap(lambda k: jax.vmap(lambda r: f(r, rng=k))(rows))(keys)
    turned = jax.vmap(lambda r: jax.vmap(lambda k: f(r, rng=k))(keys))(rows)
    for i in range(3):
        for j in range(3):
            np.testing.assert_allclose(table[i, j], f(rows[j], rng=keys[i]), 1e-6)
            np.testing.assert_allclose(turned[j, i], f(rows[j], rng=keys[i]), 1e-6)


@pytest.mark.parametrize("name", ["plain", "held"])
@pytest.mark.usefixtures("quiet")
def test_per_example_gradients_with_keys_of_their_own(x, name):
    f = torch2jax(FUNCTIONS[name], stochastic=True)
    rows = jnp.stack([x, 2 * x, 3 * x])
    keys = jax.random.split(jax.random.key(0), 3)
    for run in (jax.vmap(with_output(f)), jax.jit(jax.vmap(with_output(f)))):
        g, y = run(rows, keys)
        for k in range(3):
            own_mask(y[k], g[k], rows[k])

    def loss(w):
        y = jax.vmap(lambda r, k: f(r * w, rng=k))(rows, keys)
        return y.sum(), y

    g, y = jax.jit(jax.grad(loss, has_aux=True))(jnp.ones(N))
    np.testing.assert_allclose(g, y.sum(0), 1e-5)


def test_derivatives_of_all_kinds_use_one_mask(x):
    x = x[:16]
    f = torch2jax(lambda x: F.dropout(x, 0.5) * x, stochastic=True)
    key = jax.random.key(5)
    y = f(x, rng=key)
    mask = np.asarray(y / (x * x))

    def of(x):
        return f(x, rng=key)

    np.testing.assert_allclose(jax.jacrev(of)(x), np.diag(2 * mask * x), 1e-5)
    np.testing.assert_allclose(jax.jacfwd(of)(x), np.diag(2 * mask * x), 1e-5)
    hessian = jax.jit(jax.hessian(lambda x: of(x).sum()))(x)
    np.testing.assert_allclose(hessian, np.diag(2 * mask), 1e-5)
    second = jax.grad(lambda x: (jax.grad(lambda x: of(x).sum())(x) ** 2).sum())(x)
    np.testing.assert_allclose(second, 8 * mask**2 * x, 1e-5)
    np.testing.assert_allclose(jax.jvp(of, (x,), (x,))[1], 2 * y, 1e-5)
    # A pullback that is applied three times draws nothing anew.
    _, pull = jax.vjp(of, x)
    for k in (1.0, 2.0, 3.0):
        np.testing.assert_allclose(pull(k * jnp.ones(16))[0], 2 * k * mask * x, 1e-5)


def test_threads_seed_at_once(x):
    f = torch2jax(dropout, stochastic=True)
    step = jax.jit(with_output(f))
    keys = jax.random.split(jax.random.key(0), 100)
    expected = [np.asarray(f(x, rng=k)) for k in keys]
    before = torch.get_rng_state()
    wrong: list[int] = []

    def work(first: int) -> None:
        for n in range(100):
            k = (n + 25 * first) % 100
            g, y = step(x, keys[k])
            if not np.array_equal(y, expected[k]) or not np.allclose(g, y / x):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong, f"{len(wrong)} of 400"
    assert torch.equal(torch.get_rng_state(), before)


def test_stochastic_function_that_draws_nothing(x):
    f = torch2jax(lambda x: x.sin(), stochastic=True)
    np.testing.assert_allclose(f(x, rng=jax.random.key(0)), jnp.sin(x), 1e-6)
    g = jax.grad(lambda x: f(x, rng=jax.random.key(0)).sum())(x)
    np.testing.assert_allclose(g, jnp.cos(x), 1e-6, 1e-6)


def test_own_generator_is_its_own(x):
    """A generator that fn brings along and seeds itself is no random call of torch's default."""

    def fn(x):
        return x * torch.rand(N, generator=torch.Generator().manual_seed(1))

    f = torch2jax(fn, stochastic=True)
    a, b = (f(x, rng=jax.random.key(k)) for k in (0, 1))
    np.testing.assert_array_equal(a, b)


def test_error_in_a_seeded_call_restores_the_generator(x):
    def fn(x):
        torch.rand(3)
        if float(x.sum()) > 0:
            raise ArithmeticError("too much")
        return x

    f = torch2jax(fn, stochastic=True, output_shapes=jax.ShapeDtypeStruct((N,), "float32"))
    before = torch.get_rng_state()
    with pytest.raises(ERRORS, match="too much"):
        jax.block_until_ready(f(x, rng=jax.random.key(0)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x + torch.randn(N),
        lambda x: x + torch.randn_like(x),
        lambda x: torch.bernoulli(x / 4),
        lambda x: torch.multinomial(x, 5).float(),
        lambda x: x[torch.randperm(N)],
        lambda x: torch.distributions.Normal(x, 1.0).rsample(),
        lambda x: torch.empty(N).uniform_() * x,
        lambda x: F.rrelu(-x, training=True),
        lambda x: F.gumbel_softmax(x),
        lambda x: torch.poisson(x),
        lambda x: F.alpha_dropout(x, 0.5, training=True),
        lambda x: F.scaled_dot_product_attention(
            x.view(1, 8, 8), x.view(1, 8, 8), x.view(1, 8, 8), dropout_p=0.5
        ),
    ],
)
def test_operators_that_draw(x, draw):
    f = torch2jax(draw, stochastic=True)
    keys = jax.random.split(jax.random.key(0), 2)
    a, b, c = f(x, rng=keys[0]), jax.jit(lambda k: f(x, rng=k))(keys[0]), f(x, rng=keys[1])
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


# --- without a key -----------------------------------------------------------------------------


@pytest.fixture
def restored() -> Iterator[None]:
    """For tests that draw from torch's own generator: they put it back themselves."""
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.usefixtures("restored", "quiet")
def test_recompute_uses_the_same_mask(x, name, options, budget):
    set_tape_budget(budget)
    f = torch2jax(FUNCTIONS[name], **OPTIONS[options])
    step = with_output(f)
    seen = set()
    for run in (step, jax.jit(step)):
        for _ in range(2):
            g, y = run(x)
            own_mask(y, g, x)
            seen.add(np.asarray(y).tobytes())
    assert len(seen) == 4
    gs, ys = jax.jit(lambda x: jax.lax.scan(lambda c, _: (c, step(x)), 0, None, length=4)[1])(x)
    for k in range(4):
        own_mask(ys[k], gs[k], x)
    assert len({np.asarray(y).tobytes() for y in ys}) == 4  # never hoisted out of the loop
    assert tape_info().entries == 0


@pytest.mark.usefixtures("restored")
def test_calls_are_never_merged_or_dropped(x):
    f = torch2jax(lambda x: x + torch.rand(N))
    a, b = jax.jit(lambda x: (f(x), f(x)))(x)
    assert not np.array_equal(a, b)
    torch.manual_seed(5)
    jax.block_until_ready(jax.jit(lambda x: (f(x), x * 2)[1])(x))
    dropped = torch.get_rng_state()
    torch.manual_seed(5)
    assert not torch.equal(torch.get_rng_state(), dropped)  # the unused call drew


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_manual_seed_reproduces(x, jit):
    f = torch2jax(dropout)
    run = jax.jit(f) if jit else f
    step = jax.jit(with_output(f)) if jit else with_output(f)
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        runs.append([np.asarray(run(x)), np.asarray(run(x)), *map(np.asarray, step(x))])
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(runs[0][0], runs[0][1])


@pytest.mark.usefixtures("restored")
def test_keyless_rows(x):
    f = torch2jax(lambda x: x * 0 + torch.rand(N))
    rows = jnp.stack([x, 2 * x])
    y = jax.vmap(f)(rows)
    np.testing.assert_array_equal(y[0], y[1])  # one seed for the call: randomness="same"
    y = jax.lax.map(f, rows)
    assert not np.array_equal(y[0], y[1])


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("options", ["tape", "recompute", "depth"])
def test_checkpoint_refuses_and_says_rng(x, options):
    f = torch2jax(dropout, **OPTIONS[options])
    with pytest.raises(Exception, match="rng="):
        jax.jit(jax.grad(lambda x: jax.checkpoint(f)(x).sum()))(x)
    g = torch2jax(dropout, stochastic=True, **OPTIONS[options])
    jax.grad(lambda x: jax.checkpoint(lambda x: g(x, rng=jax.random.key(0)))(x).sum())(x)


@pytest.mark.usefixtures("restored")
def test_keyless_threads(x):
    f = torch2jax(dropout)
    step = jax.jit(with_output(f))
    step(x)
    wrong: list[Any] = []
    seen: list[bytes] = []

    def work() -> None:
        for _ in range(50):
            g, y = step(x)
            seen.append(np.asarray(y).tobytes())
            if not np.allclose(g, y / x):
                wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert len(set(seen)) == 200


@pytest.mark.usefixtures("restored")
def test_output_shapes_and_drawing(x):
    """output_shapes keeps drawing from being seen: values go, derivatives are refused."""
    f = torch2jax(dropout, output_shapes=jax.ShapeDtypeStruct((N,), "float32"))
    is_mask(f(x) / x)
    with pytest.raises(ERRORS, match=r"(?s)stochastic=True.*rng="):
        jax.block_until_ready(jax.grad(lambda x: f(x).sum())(x))
    with pytest.raises(ERRORS, match=r"(?s)stochastic=True.*rng="):
        jax.block_until_ready(jax.jit(jax.vmap(jax.grad(lambda x: f(x).sum())))(x[None]))
    g = torch2jax(dropout, output_shapes=jax.ShapeDtypeStruct((N,), "float32"), stochastic=True)
    out, y = with_output(g)(x, jax.random.key(0))
    own_mask(y, out, x)


@pytest.mark.usefixtures("restored")
def test_inference_leaves_the_generator(x):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for options in ({}, {"stochastic": True}):
        f = torch2jax(dropout, **options)
        key = {"rng": jax.random.key(0)} if options else {}
        jax.eval_shape(lambda x, f=f, key=key: f(x, **key), x)
        jax.jit(lambda x, f=f, key=key: jax.grad(lambda x: f(x, **key).sum())(x)).lower(x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("restored")
def test_nothing_of_the_seeds_stays(x):
    f = torch2jax(dropout, residuals="recompute")
    step = jax.jit(with_output(f))
    step(x)
    gc.collect()
    before = tape_info()
    for _ in range(20):
        step(x)
    assert (tape_info().entries, tape_info().bytes) == (before.entries, before.bytes) == (0, 0)
