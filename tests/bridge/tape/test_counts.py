"""How often forward and backward run, and what a call finds on the tape.

Expected values come from jax.numpy twins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tape_functions import Counted, close, through_scan, total, twin

from torch2jax import clear_tape, set_tape_budget, tape_info, torch2jax
from torch2jax._bridge.torch_side.tape import table as internals


def counted(transform: Callable[[Any], Any], *args: Any, **options: Any) -> tuple[Counted, Any]:
    """The second run of a compiled transform: tracing and inference have run fn by then."""
    fn = Counted()
    run = transform(torch2jax(fn, **options))
    jax.block_until_ready(run(*args))
    clear_tape()
    fn.reset()
    out = jax.block_until_ready(run(*args))
    return fn, out


# --- how often -----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [None, 1, 2])
@pytest.mark.parametrize(("residuals", "forward"), [("tape", 1), ("recompute", 2)])
def test_forward_runs_once(x, residuals, forward, depth):
    fn, out = counted(
        lambda f: jax.jit(jax.value_and_grad(total(f))), x, residuals=residuals, depth=depth
    )
    assert fn.runs == (forward, 1)
    assert tape_info().entries == tape_info().bytes == 0
    close(out, jax.value_and_grad(total(twin))(x))


@pytest.mark.parametrize("depth", [None, 1])
def test_forward_runs_once_in_eager_mode(x, depth):
    fn, out = counted(lambda f: jax.value_and_grad(total(f)), x, depth=depth)
    assert fn.runs == (1, 1)
    assert tape_info().entries == tape_info().bytes == 0
    close(out, jax.value_and_grad(total(twin))(x))


@pytest.mark.parametrize("depth", [None, 1])
def test_no_misses_in_a_scan(x, depth):
    before = tape_info()
    fn, out = counted(lambda f: jax.jit(jax.grad(through_scan(f, 100))), x, depth=depth)
    assert fn.runs == (100, 100)
    assert fn.recorded == 100
    assert tape_info().misses == before.misses
    assert tape_info().hits == before.hits + 200  # two runs
    assert tape_info().entries == tape_info().bytes == 0
    close(out, jax.grad(through_scan(twin, 100))(x))


@pytest.mark.parametrize("depth", [None, 1])
@pytest.mark.parametrize("steps", [1, 5])
def test_checkpoint_keeps_nothing_in_its_first_forward(x, steps, depth):
    def transform(f):
        return jax.jit(jax.grad(through_scan(jax.checkpoint(f), steps)))

    fn, out = counted(transform, x, depth=depth)
    assert fn.runs == (2 * steps, steps)
    assert fn.recorded == steps  # the recomputed ones
    assert set(fn.entries) == {0}
    assert tape_info().entries == 0
    close(out, jax.grad(through_scan(twin, steps))(x))


def test_checkpoint_of_a_chain(x):
    def chain(f):
        return jax.checkpoint(lambda x: f(f(f(x))))

    fn, out = counted(lambda f: jax.jit(jax.value_and_grad(total(chain(f)))), x)
    assert fn.backward == 3
    assert fn.recorded == 3
    assert tape_info().entries == 0
    close(out, jax.value_and_grad(total(chain(twin)))(x))


def test_checkpoint_policy_saves_the_token(x):
    policy = jax.checkpoint_policies.everything_saveable
    fn, out = counted(lambda f: jax.jit(jax.grad(total(jax.checkpoint(f, policy=policy)))), x)
    assert fn.runs == (1, 1)
    assert tape_info().entries == 0
    close(out, jax.grad(total(twin))(x))


@pytest.mark.parametrize("depth", [None, 1])
def test_unused_vjp_keeps_nothing(x, depth):
    fn, out = counted(lambda f: jax.jit(lambda x: jax.vjp(f, x)[0]), x, depth=depth)
    assert (fn.runs, fn.recorded) == ((1, 0), 0)
    assert tape_info().entries == 0
    close(out, twin(x))


def test_jacrev_is_one_forward_and_one_batched_backward(x):
    fn, out = counted(lambda f: jax.jit(jax.jacrev(f)), x)
    assert fn.runs == (1, 1)
    assert tape_info().entries == 0
    close(out, jax.jacrev(twin)(x))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("order", ["vmap_grad", "grad_vmap"])
def test_per_example_gradients_run_once(x, order, jit):
    def transform(f):
        if order == "vmap_grad":
            return maybe(jax.vmap(jax.grad(total(f))))
        return maybe(jax.grad(total(jax.vmap(f))))

    rows = jnp.outer(jnp.arange(1.0, 5.0), x)
    maybe = jax.jit if jit else (lambda f: f)
    before = tape_info()
    fn, out = counted(transform, rows)
    assert fn.forward == 1
    assert tape_info().hits == before.hits + 2  # two runs
    assert tape_info().misses == before.misses
    close(out, jax.grad(total(twin))(rows))
    assert tape_info().entries == 0


def test_vmap_over_cotangents_and_primals(x):
    rows = jnp.outer(jnp.arange(1.0, 4.0), x)

    def pull(f):
        return lambda x, c: jax.vjp(f, x)[1](c)[0]

    for axes in ((0, 0), (0, None), (None, 0), (1, 1)):
        args = [r if a is None else jnp.moveaxis(rows, 0, a) for a, r in zip(axes, (x, x))]  # noqa: B905
        out = jax.jit(jax.vmap(pull(torch2jax(Counted())), axes))(*args)
        close(out, jax.vmap(pull(twin), axes)(*args))
    assert tape_info().entries == 0


def test_jvp_pops_the_token(x):
    f = torch2jax(Counted())
    for run in (jax.jvp, jax.jit(functools.partial(jax.jvp, f))):
        args = ((x,), (x,))
        out = run(f, *args) if run is jax.jvp else run(*args)
        close(out, jax.jvp(twin, (x,), (x,)))
        assert tape_info().entries == 0
    y, push = jax.linearize(f, x)
    for k in (1.0, 2.0, 3.0):
        close(push(k * x), jax.jvp(twin, (x,), (k * x,))[1])
    close(y, twin(x))
    assert tape_info().entries == 0


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.grad(lambda x: (jax.grad(total(f))(x) ** 2).sum()),
        lambda f: jax.hessian(total(f)),
        lambda f: jax.jacrev(jax.jacrev(f)),
        lambda f: jax.jacfwd(jax.jacrev(jax.jacfwd(f))),
        lambda f: jax.grad(lambda x: jax.grad(lambda x: jax.grad(total(f))(x).sum())(x).sum()),
        lambda f: lambda x: jax.jvp(jax.grad(total(f)), (x,), (x,))[1],
        lambda f: lambda x: jax.grad(lambda x: jax.jvp(total(f), (x,), (x,))[1])(x),
        lambda f: jax.vmap(lambda k: jax.hessian(lambda x: total(f)(x * k))(jnp.ones(3))),
        lambda f: jax.grad(lambda x: jax.vmap(jax.grad(total(f)))(jnp.outer(x, x)).sum()),
        lambda f: jax.grad(lambda x: total(jax.checkpoint(jax.grad(total(f))))(x)),
    ],
    ids=["gg", "hess", "rr", "frf", "ggg", "fr", "rf", "vmap-hess", "g-vmap-g", "g-ckpt-g"],
)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_higher_orders(x, transform, jit):
    maybe = jax.jit if jit else (lambda f: f)
    f = torch2jax(Counted())
    close(maybe(transform(f))(x), transform(twin)(x), 2e-4)
    assert tape_info().entries <= 1  # where XLA has merged two calls


def test_depth_two_twice(x):
    def second(f):
        return jax.jit(jax.grad(lambda x: (jax.grad(total(f))(x) ** 2).sum()))

    close(second(torch2jax(Counted(), depth=2))(x), second(twin)(x), 1e-4)
    assert tape_info().entries <= 1  # where XLA has merged two calls


# --- tokens used again, or unknown ---------------------------------------------------------------


@pytest.mark.parametrize("depth", [None, 1])
def test_vjp_applied_three_times(x, depth):
    fn = Counted()
    f = torch2jax(fn, depth=depth)
    jax.vjp(f, x)[1](x)
    fn.reset()
    _, pull = jax.vjp(f, x)
    _, expected = jax.vjp(twin, x)
    for k in (1.0, 2.0, 3.0, 4.0):
        close(pull(k * x), expected(k * x))
    assert fn.runs == (2, 4)  # the graph that the first miss rebuilds is kept
    assert tape_info().entries <= 1


@pytest.mark.parametrize("budget", [None, 0])
def test_constant_call_in_a_scan(x, budget):
    set_tape_budget(budget)

    def loop(f):
        def run(w):
            def step(c, k):
                return c + jax.grad(lambda w: (f(w) * k).sum())(w), None

            return jax.lax.scan(step, jnp.zeros_like(w), jnp.arange(10.0))[0]

        return jax.jit(run)

    fn = Counted()
    run = loop(torch2jax(fn))
    for k in (1.0, 2.0):
        close(run(x * k), loop(twin)(x * k))
    fn.reset()
    run(x)
    assert fn.backward == 10
    assert tape_info().entries <= 1


def test_two_constant_calls_in_a_scan(x):
    def loop(f):
        def run(w):
            def step(c, k):
                g = jax.grad(lambda w: (f(w) * k).sum() + (f(2 * w) * f(3 * w)).sum() * k)(w)
                return c + g, None

            return jax.lax.scan(step, jnp.zeros_like(w), jnp.arange(5.0))[0]

        return jax.jit(run)

    close(loop(torch2jax(Counted()))(x), loop(twin)(x), 1e-4)
    assert tape_info().entries <= 1


def test_pullback_outside_its_jit(x):
    f = torch2jax(Counted())
    y, pull = jax.jit(lambda x: jax.vjp(f, x))(x)
    for k in (1.0, 2.0, 3.0):
        close(jax.jit(lambda p, c: p(c))(pull, k * x), jax.vjp(twin, x)[1](k * x))
    close(y, twin(x))


def test_equal_calls_that_xla_merges(x):
    def both(f):
        return lambda x: f(x) * f(x) + jnp.cos(f(x))

    close(jax.jit(jax.grad(total(both(torch2jax(Counted())))))(x), jax.grad(total(both(twin)))(x))


def clearing(x: jax.Array) -> jax.Array:
    """The identity, whose backward pass clears the tape first."""

    def clear(c: Any) -> Any:
        assert tape_info().entries > 0
        clear_tape()
        return c

    @jax.custom_vjp
    def identity(x):
        return x

    def backward(_, c):
        return (jax.pure_callback(clear, jax.ShapeDtypeStruct(c.shape, c.dtype), c),)

    identity.defvjp(lambda x: (x, None), backward)
    return identity(x)


@pytest.mark.parametrize("depth", [None, 1])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_cleared_between_forward_and_backward(x, jit, depth):
    f = torch2jax(Counted(), depth=depth)
    maybe = jax.jit if jit else (lambda f: f)
    before = tape_info().misses
    out = maybe(jax.grad(lambda x: clearing(f(x)).sum()))(x)
    close(out, jax.grad(total(twin))(x))
    assert tape_info().misses == before + 1


def test_token_of_another_callable_is_a_miss(x):
    f, g = torch2jax(Counted()), torch2jax(lambda x: x.cos() * x)
    _, pull_f = jax.vjp(f, x)
    _, pull_g = jax.vjp(g, x)
    table = internals.tape
    (token_f, graph_f), (token_g, graph_g) = table._graphs.items()
    assert graph_f.policy is not graph_g.policy
    assert table.take(token_f, graph_g.policy, graph_g.device) is None
    assert table.take(token_f, graph_f.policy, torch.device("meta")) is None
    assert table.take((*token_f[:2], 2**31, 0), graph_f.policy, graph_f.device) is None
    assert tape_info().entries == 2
    # Swapped under each other's tokens: both recompute, and are right.
    table._graphs[token_f], table._graphs[token_g] = graph_g, graph_f
    close(pull_f(x), jax.vjp(twin, x)[1](x))
    close(pull_g(x), jax.vjp(lambda x: jnp.cos(x) * x, x)[1](x))


def test_tokens_carry_the_process():
    first, second = internals.Tape(), internals.Tape()
    assert first._nonce != second._nonce


# --- outputs and operands ------------------------------------------------------------------------


def several(x, n, w):
    return {
        "a": x.sin() * w,
        "index": n + 1,
        "b": (x * w).exp(),
        "mask": x > 0.5,
        "constant": (x > 0.5).float(),
        "idle": x.detach() * 2,
    }


def several_twin(x, n, w):
    return {
        "a": jnp.sin(x) * w,
        "index": n + 1,
        "b": jnp.exp(x * w),
        "mask": x > 0.5,
        "constant": (x > 0.5).astype(float),
        "idle": jax.lax.stop_gradient(x) * 2,
    }


@pytest.mark.parametrize("depth", [None, 1])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("used", [["a"], ["b"], ["a", "b"], ["constant"], ["idle", "b"]])
def test_several_outputs(x, used, jit, depth):
    def loss(f):
        def run(x, w):
            out = f(x, jnp.arange(6), w)
            return sum((out[k] ** 2).sum() for k in used)

        return run

    maybe = jax.jit if jit else (lambda f: f)
    f = torch2jax(several, depth=depth)
    for argnums in (0, 1, (0, 1)):
        close(
            maybe(jax.grad(loss(f), argnums))(x, 2 * x),
            jax.grad(loss(several_twin), argnums)(x, 2 * x),
        )
    assert tape_info().entries == 0


def test_vjp_of_all_outputs(x):
    f = torch2jax(several)
    n = jnp.arange(6)
    y, pull = jax.vjp(lambda x, w: f(x, n, w), x, 2 * x)
    expected, pull_twin = jax.vjp(lambda x, w: several_twin(x, n, w), x, 2 * x)
    close(y, expected)

    def seed(leaf):
        inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return leaf if inexact else np.zeros(leaf.shape, jax.dtypes.float0)

    seeds = jax.tree.map(seed, expected)
    close(pull(seeds), pull_twin(seeds))
    out = jax.jit(jax.jacrev(lambda x: f(x, n, x)["a"]))(x)
    close(out, jax.jacrev(lambda x: several_twin(x, n, x)["a"])(x))
