"""What the tape learns of a function: see NOTE [Habits] in tape/habits.py.

Expected values come from jax.numpy twins. The first graph of a function may be refused (it is then
kept on copies from the second on): in a process that ran many tests before, it is. A pullback
without a graph is no hit and no miss, so one less is right here.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tape_functions import Counted, close, through_scan, total, twin

from torch2jax import Torch2JaxWarning, set_tape_budget, tape_info, torch2jax
from torch2jax._bridge.torch_side.tape import habits


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph weighs little, and a function keeps four without any reason."""
    monkeypatch.setattr(habits, "LITTLE", 0)
    monkeypatch.setattr(habits, "FEW", 4)


def chain_by_hand(f: Callable[..., Any], x: jax.Array, steps: int) -> tuple[jax.Array, int, int]:
    """A chain of eager calls, then their pullbacks; returns the gradient, hits and misses."""
    before, pulls = tape_info(), []
    for _ in range(steps):
        x, pull = jax.vjp(f, x)
        pulls.append(pull)
    c = jnp.ones_like(x)
    for pull in reversed(pulls):
        (c,) = pull(c)
    jax.block_until_ready(c)
    after = tape_info()
    return c, after.hits - before.hits, after.misses - before.misses


def test_dropped_pullbacks_keep_little():
    """1,500 graphs of 2 MB: without habits 3 GB."""
    f = torch2jax(lambda x: x.sin())
    x = jnp.ones(500_000)
    run = jax.jit(lambda x: jax.vjp(f, x))
    for _ in range(50):
        _, pull = jax.block_until_ready(run(x))
        assert tape_info().bytes <= max(habits.LITTLE, (habits.FEW + 1) * x.nbytes)
    close(pull(x)[0], x * jnp.cos(x))


@pytest.mark.usefixtures("strict")
def test_dropped_pullbacks_without_a_reason(x):
    f = torch2jax(Counted())
    run = jax.jit(lambda x: jax.vjp(f, x))
    for _ in range(50):
        jax.block_until_ready(run(x))
        assert tape_info().entries <= habits.FEW
    assert tape_info().evictions >= 40


@pytest.mark.usefixtures("strict")
def test_a_warning_is_for_the_budget_alone(x, monkeypatch):
    f = torch2jax(Counted())
    run = jax.jit(lambda x: jax.vjp(f, x))
    monkeypatch.setattr("torch2jax._bridge.torch_side.tape.table.tape._warned", False)
    for _ in range(10):
        jax.block_until_ready(run(x))
    with pytest.warns(Torch2JaxWarning, match="budget"):
        set_tape_budget(1)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("outer_jit", [False, True], ids=["jit-forward", "jit"])
def test_a_scan_takes_all_its_graphs(x, outer_jit):
    """Whether backward is of the same execution or of the next."""
    maybe = jax.jit if outer_jit else (lambda f: f)
    loss = jax.jit(through_scan(torch2jax(Counted()), 300))
    before = tape_info()
    for k in (1.0, 2.0):
        close(maybe(jax.grad(loss))(x * k), jax.grad(through_scan(twin, 300))(x * k))
    after = tape_info()
    assert after.hits - before.hits in (599, 600)
    assert after.misses == before.misses
    assert after.evictions == before.evictions
    assert after.entries == 0


@pytest.mark.usefixtures("strict")
def test_a_step_by_hand_is_learnt(x):
    fn = Counted()
    f = torch2jax(fn)

    def by_twin(x: jax.Array) -> jax.Array:
        for _ in range(20):
            x = twin(x)
        return x.sum()

    c, hits, misses = chain_by_hand(f, x, 20)
    assert hits == 4  # the first time nobody knows
    assert misses in (15, 16)
    close(c, jax.grad(by_twin)(x))
    for _ in range(2):
        c, hits, misses = chain_by_hand(f, x, 20)
        assert (hits, misses) == (20, 0)
        close(c, jax.grad(by_twin)(x))
    assert tape_info().entries == tape_info().bytes == 0
    run = jax.jit(lambda x: jax.vjp(f, x))
    for _ in range(100):
        jax.block_until_ready(run(x))
    assert tape_info().entries <= 2 * 20 + 4  # a small multiple of what was needed


@pytest.mark.usefixtures("strict")
def test_a_gradient_in_one_program_teaches_no_reach(x):
    f = torch2jax(Counted())
    jax.block_until_ready(jax.jit(jax.grad(through_scan(f, 100)))(x))
    run = jax.jit(lambda x: jax.vjp(f, x))
    for _ in range(30):
        jax.block_until_ready(run(x))
    assert tape_info().entries <= habits.FEW


@pytest.mark.usefixtures("strict")
def test_functions_have_habits_of_their_own(x):
    f, g = torch2jax(Counted()), torch2jax(lambda x: x.cos() * x)
    _, pull = jax.vjp(f, x)
    for _ in range(20):
        jax.block_until_ready(jax.vjp(g, x)[0])
    before = tape_info().misses
    close(pull(x), jax.vjp(twin, x)[1](x))
    assert tape_info().misses == before


@pytest.mark.usefixtures("strict")
def test_a_budget_of_ones_own_is_used(x):
    set_tape_budget(2**30)
    f = torch2jax(Counted())
    for _ in range(30):
        jax.block_until_ready(jax.vjp(f, x)[0])
    assert tape_info().entries in (29, 30)


@pytest.mark.usefixtures("strict")
def test_pullbacks_of_many_threads(x):
    """Executions of several threads: some graphs are dropped too early, and all is right."""
    f = torch2jax(Counted())
    expected = jax.grad(total(lambda x: twin(twin(twin(x)))))(x)
    wrong: list[Any] = []

    def work() -> None:
        for _ in range(10):
            c, _, _ = chain_by_hand(f, x, 3)
            if not jnp.allclose(c, expected, atol=1e-4):
                wrong.append(c)

    threads = [threading.Thread(target=work) for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not wrong
    assert tape_info().entries == tape_info().bytes == 0
