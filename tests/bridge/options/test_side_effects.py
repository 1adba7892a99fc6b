"""`side_effects`, `lock` and `name`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest
import torch
from option_functions import Counted, X, same, sds

from torch2jax import Size, torch2jax


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
