"""How much the tape keeps: its budget, its bytes, small graphs.

Expected values come from jax.numpy twins.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.utils.checkpoint as checkpoints
from tape_functions import (
    ERRORS,
    PACKAGE,
    SMALL,
    Counted,
    close,
    run_python,
    through_scan,
    total,
    twin,
)

from torch2jax import (
    SignatureError,
    Torch2JaxWarning,
    clear_tape,
    set_tape_budget,
    tape_info,
    torch2jax,
)
from torch2jax._bridge.torch_side.tape import kept_graph, table

# --- how much ------------------------------------------------------------------------------------


def kept_bytes(f: Callable[..., Any], x: jax.Array) -> int:
    clear_tape()
    pull = jax.vjp(f, x)[1]
    found = tape_info().bytes
    pull(x)
    assert tape_info().bytes == 0
    return found


def test_least_recently_used_goes_first():
    f = torch2jax(lambda x: x.sin() * x)
    x = jnp.linspace(0.0, 1.0, 1000)
    set_tape_budget(2 * kept_bytes(f, x))
    before = tape_info()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Torch2JaxWarning)
        outs, pulls = zip(*(jax.vjp(f, x * k) for k in (1.0, 2.0, 3.0)), strict=True)
        jax.block_until_ready(outs)
    assert tape_info().entries == 2
    assert tape_info().evictions == before.evictions + 1
    for k, pull, missed in ((2.0, pulls[1], 0), (3.0, pulls[2], 0), (1.0, pulls[0], 1)):
        close(pull(x), jax.vjp(twin, x * k)[1](x))
        assert tape_info().misses == before.misses + missed
    assert tape_info().entries == 0


def test_use_makes_a_graph_recent():
    f, g = torch2jax(lambda x: x.sin() * x), torch2jax(lambda x: x.cos() * x)
    x = jnp.linspace(0.0, 1.0, 1000)
    set_tape_budget(2 * kept_bytes(f, x))
    _, often = jax.vjp(f, x)
    often(x)
    often(x)  # kept for the next use
    jax.block_until_ready(jax.vjp(g, x)[0])
    often(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Torch2JaxWarning)
        jax.block_until_ready(jax.vjp(g, 2 * x)[0])
    before = tape_info().misses
    close(often(x), jax.vjp(twin, x)[1](x))
    assert tape_info().misses == before


def test_lower_budget_takes_effect_at_once(x):
    f = torch2jax(lambda x: x.sin() * x)
    pulls = [jax.vjp(f, x * k)[1] for k in (1.0, 2.0)]
    assert tape_info().entries == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Torch2JaxWarning)
        set_tape_budget(0)
    assert tape_info().entries == tape_info().bytes == 0
    for k, pull in zip((1.0, 2.0), pulls, strict=True):
        close(pull(x), jax.vjp(twin, x * k)[1](x))


def test_a_budget_of_zero_keeps_no_graph_without_activations(x):
    set_tape_budget(0)
    _, pull = jax.vjp(torch2jax(lambda x: x + x), x)
    assert tape_info().entries == 0
    close(pull(x)[0], 2 * x)


@pytest.mark.parametrize("bad", [-1, 1.5, "1GB"])
def test_budget_refuses(bad):
    with pytest.raises(SignatureError, match="bytes"):
        set_tape_budget(bad)


@pytest.mark.parametrize("bad", ["4GB", "-5"])
def test_budget_of_the_environment_refuses(bad, monkeypatch):
    monkeypatch.setenv("TORCH2JAX_TAPE_BYTES", bad)
    with pytest.raises(SignatureError, match=f"TORCH2JAX_TAPE_BYTES='{bad}' must be a number"):
        table.Tape()


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_budget_of_zero_is_right(x, jit):
    set_tape_budget(0)
    maybe = jax.jit if jit else (lambda f: f)
    f = torch2jax(Counted())
    rows = jnp.outer(x, x)
    for transform, arg in (
        (lambda f: jax.value_and_grad(total(f)), rows),
        (lambda f: jax.grad(through_scan(f, 4)), rows),
        (jax.jacrev, x),
        (lambda f: jax.vmap(jax.grad(total(f))), rows),
        (lambda f: jax.grad(total(jax.checkpoint(f))), rows),
        (lambda f: jax.hessian(total(f)), x),
    ):
        close(maybe(transform(f))(arg), transform(twin)(arg), 1e-4)
        assert tape_info().entries == tape_info().bytes == 0


def resident() -> int:
    gc.collect()
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class HoldsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x * x

    @staticmethod
    def backward(ctx, c):
        return 2 * ctx.x * c


def plain_chain(x):
    for _ in range(8):
        x = x.sin()
    return x.sum()


def held_chain(x):
    return plain_chain(HoldsInput.apply(x))


def func_chain(x):
    return plain_chain(x + torch.func.grad(lambda t: t.sin().sum())(x))


def checkpointed_chain(x):
    for _ in range(8):
        x = checkpoints.checkpoint(torch.sin, x, use_reentrant=False)
    return x.sum()


def wasteful_chain(x):
    """Its dead branches save tensors whose memory is used again."""
    for _ in range(4):
        dead = torch.cat([x, x]).exp().sin()
        del dead
        x = x.sin()
    return plain_chain(x)


@pytest.mark.parametrize(
    "fn", [plain_chain, held_chain, func_chain, checkpointed_chain, wasteful_chain]
)
def test_memory_is_flat_where_no_backward_runs(fn):
    """96 kB a run, all that one array is, are 19 MB when 200 leak."""
    f = torch2jax(fn)
    xs = jnp.linspace(0.0, 1.0, 24 * 1024)
    set_tape_budget(3 * 2**20)
    run = jax.jit(lambda x: jax.vjp(f, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Torch2JaxWarning)
        for _ in range(60):
            jax.block_until_ready(run(xs))
        before = resident()
        for _ in range(200):
            jax.block_until_ready(run(xs))
        assert resident() - before < 16 * 2**20
        assert 0 < tape_info().bytes <= 3 * 2**20
        assert 0 < tape_info().entries < 40
        clear_tape()
        assert tape_info().bytes == 0


@pytest.mark.parametrize("fn", [plain_chain, held_chain, func_chain, checkpointed_chain])
def test_bytes_count_what_a_graph_keeps(fn):
    """Seven activations of 1 MB: no graph here keeps less; uncounted, a budget bounds nothing."""
    f = torch2jax(fn)
    xs = jnp.linspace(0.0, 1.0, 2**18)
    jax.grad(f)(xs)  # the choice between views and copies is made
    clear_tape()
    jax.block_until_ready(jax.vjp(f, xs)[0])
    assert tape_info().entries == 1
    assert tape_info().bytes >= 6 * 2**20


def test_bytes_return_to_zero_in_any_order():
    f = torch2jax(wasteful_chain)
    rng = np.random.default_rng(0)
    pulls: list[Any] = []
    for n in rng.choice([64, 1000, 3000, 30_000, 100_000], 60):
        y, pull = jax.vjp(f, jnp.linspace(0.0, 1.0, int(n)))
        jax.block_until_ready(y)
        pulls.append(pull)
        if len(pulls) > 4:
            jax.block_until_ready(pulls.pop(int(rng.integers(len(pulls))))(jnp.ones(())))
        assert tape_info().entries == len(pulls)
    for pull in pulls:
        jax.block_until_ready(pull(jnp.ones(())))
    assert (tape_info().entries, tape_info().bytes) == (0, 0)


def test_environment_and_first_eviction():
    out = run_python(
        """
        import warnings, jax, jax.numpy as jnp
        from PACKAGE import torch2jax, tape_info, Torch2JaxWarning, set_tape_budget
        print(tape_info().budget)
        f = torch2jax(lambda x: x.sin() * x)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            pulls = [jax.vjp(f, jnp.ones(10_000) * k) for k in range(5)]
            jax.block_until_ready([y for y, _ in pulls])
        assert (tape_info().entries, tape_info().evictions) == (2, 3), tape_info()
        found = [w for w in found if w.category is Torch2JaxWarning]
        print(len(found), found[0].message)
        """,
        **{f"{PACKAGE.upper()}_TAPE_BYTES": "80000"},
    ).splitlines()
    assert out[0] == "80000"
    assert out[1].startswith("1 ")
    assert "set_tape_budget" in out[1]


# --- small graphs --------------------------------------------------------------------------------


def test_small_graphs_need_no_hooks(x, small, monkeypatch):
    fn = Counted()
    f = torch2jax(fn)
    run = jax.jit(jax.value_and_grad(total(f)))
    jax.block_until_ready(run(x))
    fn.reset()
    monkeypatch.setattr(kept_graph.SavedTensors, "pack", None)
    close(run(x + 1), jax.value_and_grad(total(twin))(x + 1))
    assert fn.runs == (1, 1)
    monkeypatch.undo()
    monkeypatch.setattr(kept_graph.SavedTensors, "pack", refuse)
    with pytest.raises(ERRORS, match="a hook"):  # others have not been measured
        jax.block_until_ready(jax.grad(total(f))(jnp.ones(SMALL)))


def refuse(source: Any, t: torch.Tensor) -> Any:
    raise ValueError("a hook")


def test_bytes_of_small_graphs(x, small):
    f = torch2jax(lambda x: x.sin() * x)
    jax.block_until_ready(jax.vjp(f, x)[0])
    clear_tape()
    kept = [jax.vjp(f, x * k) for k in range(5)]
    jax.block_until_ready([y for y, _ in kept])
    each = x.nbytes * 2  # x, and its sine
    assert (tape_info().entries, tape_info().bytes) == (5, 5 * each)
    set_tape_budget(3 * each)
    assert (tape_info().entries, tape_info().bytes) == (3, 3 * each)
    for k, (_, pull) in enumerate(kept):
        close(pull(jnp.ones(6))[0], jax.grad(total(twin))(x * k))
    assert (tape_info().entries, tape_info().bytes) == (0, 0)


@pytest.mark.parametrize("held", [False, True])
def test_what_is_held_is_no_small_graph(x, small, held):
    f = torch2jax(HoldsInput.apply if held else lambda x: x * x)
    grad = jax.jit(jax.grad(total(f)))
    for k in range(3):
        close(grad(x + k), 2 * (x + k))
    assert (f._label in tape_info().on_copies) is held


def test_graphs_go_with_their_callable(x):
    f = torch2jax(Counted())
    jax.block_until_ready(jax.vjp(f, x)[0])
    assert tape_info().entries == 1
    del f
    jax.clear_caches()
    gc.collect()
    assert tape_info().entries == 0
