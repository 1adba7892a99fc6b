"""Under jax.checkpoint a backward call runs forward by itself, when its cotangent is there.

Expected values come from jax.numpy twins. See `_without_recomputed_token` in derivatives.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
from harness import precision
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tape_functions import ERRORS, close, total

from torch2jax import clear_tape, tape_info, torch2jax

BLOCKS = 6


class Block:
    """sin(x * w), which counts its runs and the graphs that wait for their backward pass."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.forward = self.backward = self.waiting = self.most = 0

    def __call__(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = torch.sin(x * w)
        with self.lock:
            self.forward += 1
            if y.requires_grad:
                self.waiting += 1
                self.most = max(self.most, self.waiting)
        if y.requires_grad:
            y.register_hook(self.count)
        return y

    def count(self, _: torch.Tensor) -> None:
        with self.lock:
            self.backward += 1
            self.waiting -= 1


def twin(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.sin(x * w)


def loop(block: Callable[..., Any]) -> Callable[..., jax.Array]:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        for i in range(BLOCKS):
            x = block(x, w[i])
        return (x * x).sum()

    return loss


def scan(block: Callable[..., Any]) -> Callable[..., jax.Array]:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, w: (block(x, w), None), x, w)
        return (x * x).sum()

    return loss


def nnx_remat(f: Callable[..., Any]) -> Callable[..., Any]:
    from flax import nnx  # which needs a newer jax than the oldest of the matrix

    return nnx.remat(lambda x, w: f(x, w))


def named(f: Callable[..., Any]) -> Callable[..., Any]:
    policy = jax.checkpoint_policies.save_only_these_names("out")
    return jax.checkpoint(lambda x, w: checkpoint_name(f(x, w), "out"), policy=policy)


def dots(f: Callable[..., Any]) -> Callable[..., Any]:
    return jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable)


CHECKPOINTS = {
    "jax.checkpoint": jax.checkpoint,
    "no-cse": lambda f: jax.checkpoint(f, prevent_cse=False),
    "nested": lambda f: jax.checkpoint(jax.checkpoint(f)),
    "jit-inside": lambda f: jax.checkpoint(jax.jit(f)),
    "jit-outside": lambda f: jax.jit(jax.checkpoint(f)),
    "nnx.remat": nnx_remat,
    "eqx.filter_checkpoint": eqx.filter_checkpoint,
    "save_only_these_names": named,
    "dots_saveable": dots,
}


@pytest.fixture
def w() -> jax.Array:
    return jnp.linspace(0.5, 1.5, BLOCKS)


@pytest.mark.parametrize(
    ("checkpoint", "over", "depth"),
    [
        *((name, loop, None) for name in CHECKPOINTS),
        *(("jax.checkpoint", scan, depth) for depth in (None, 1)),
        ("nnx.remat", scan, None),
    ],
)
def test_one_graph_at_a_time(w, x, checkpoint, over, depth):
    block = Block()
    f = CHECKPOINTS[checkpoint](torch2jax(block, depth=depth))
    run = jax.jit(jax.value_and_grad(over(f), (0, 1)))
    jax.block_until_ready(run(w, x))
    before = tape_info()
    block.reset()
    close(run(w, x), jax.value_and_grad(over(twin), (0, 1))(w, x))
    assert (block.forward, block.backward) == (2 * BLOCKS, BLOCKS)
    assert (block.waiting, block.most) == (0, 1)
    assert tape_info() == before


def test_one_graph_at_a_time_without_jit(w, x):
    block = Block()
    run = jax.value_and_grad(loop(jax.checkpoint(torch2jax(block))))
    jax.block_until_ready(run(w, x))
    block.reset()
    close(run(w, x), jax.value_and_grad(loop(twin))(w, x))
    assert (block.forward, block.backward) == (2 * BLOCKS, BLOCKS)
    assert (block.waiting, block.most, tape_info().entries) == (0, 1, 0)


@pytest.mark.parametrize("policy", ["everything_saveable", "torch"])
def test_a_policy_that_saves_the_call(w, x, policy):
    def saves_torch(prim: Any, *_: Any, **__: Any) -> bool:
        return prim.name.startswith("torch2jax")

    chosen = saves_torch if policy == "torch" else jax.checkpoint_policies.everything_saveable
    block = Block()
    run = jax.jit(jax.grad(loop(jax.checkpoint(torch2jax(block), policy=chosen))))
    jax.block_until_ready(run(w, x))
    block.reset()
    before = tape_info()
    close(run(w, x), jax.grad(loop(twin))(w, x))
    assert (block.forward, block.backward) == (BLOCKS, BLOCKS)
    assert tape_info().hits == before.hits + BLOCKS
    assert tape_info().entries == 0


def test_a_policy_that_offloads_the_call_saves_it(w, x):
    from jax._src.interpreters.partial_eval import Offloadable

    def policy(*_: Any, **__: Any) -> Any:
        return Offloadable(src="device", dst="pinned_host")

    f = torch2jax(Block())
    loss = loop(jax.checkpoint(f, policy=policy))
    close(jax.jit(jax.grad(loss))(w, x), jax.grad(loop(twin))(w, x))


@pytest.mark.parametrize("over", ["block", "loop", "scan"])
def test_blocks_of_several_calls(w, x, over):
    """Each call runs forward once more for its own backward pass; one graph lives at a time."""
    block = Block()
    f = torch2jax(block)

    def three(f: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, w: f(f(f(x, w), w + 1), w) + x

    losses = {
        "block": lambda f, c: loop(c(three(f))),
        "loop": lambda f, c: c(loop(three(f))),
        "scan": lambda f, c: c(scan(three(f))),
    }
    run = jax.jit(jax.grad(losses[over](f, jax.checkpoint), (0, 1)))
    jax.block_until_ready(run(w, x))
    block.reset()
    close(run(w, x), jax.grad(losses[over](twin, lambda f: f), (0, 1))(w, x), 1e-4)
    assert block.backward == 3 * BLOCKS
    assert block.forward <= 9 * BLOCKS
    assert (block.waiting, block.most, tape_info().entries) == (0, 1, 0)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.vmap(jax.grad(total(f)), (0, None)),
        lambda f: jax.grad(total(jax.vmap(f, (0, None)))),
        lambda f: lambda x, w: jax.jacrev(f)(x[0], w),
        lambda f: lambda x, w: jax.jacfwd(f)(x[0], w),
        lambda f: lambda x, w: jax.hessian(total(f))(x[0], w),
        lambda f: lambda x, w: jax.jvp(jax.grad(total(f), 1), (x, w), (x, w)),
        lambda f: lambda x, w: jax.vjp(f, x, w)[1](x),
        lambda f: lambda x, w: jax.linearize(f, x, w)[1](x, w),
        lambda f: lambda x, w: jax.lax.cond(w > 0, jax.grad(total(f)), lambda x, w: x, x, w),
        lambda f: lambda x, w: jax.grad(lambda x: (jax.grad(total(f))(x, w) ** 2).sum())(x),
    ],
    ids=["vmap-g", "g-vmap", "rev", "fwd", "hessian", "fr", "vjp", "linearize", "cond", "gg"],
)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_transforms(x, transform, jit):
    maybe = jax.jit if jit else (lambda f: f)
    f = torch2jax(Block())
    rows, w = jnp.outer(jnp.arange(1.0, 4.0), x), jnp.float32(0.7)
    close(maybe(transform(jax.checkpoint(f)))(rows, w), transform(twin)(rows, w), 1e-4)
    assert tape_info().entries <= 1  # where XLA has merged two calls


def test_a_pullback_from_outside_keeps_its_token(x):
    """The graph was kept before the checkpoint, and what is linear in its cotangent uses it."""
    f = torch2jax(Block())
    w = jnp.float32(0.7)

    def loss(f: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: jax.Array, c: jax.Array) -> jax.Array:
            _, pull = jax.vjp(f, x, w)
            return (jax.checkpoint(lambda c: pull(c)[0])(c) ** 2).sum()

        return run

    grad = jax.jit(jax.grad(loss(f), (0, 1)))
    close(grad(x, 2 * x), jax.grad(loss(twin), (0, 1))(x, 2 * x), 1e-4)
    assert tape_info().entries <= 1


def test_donation_and_x64(w, x):
    f = torch2jax(Block())
    step = jax.jit(jax.grad(loop(jax.checkpoint(f))), donate_argnums=0)
    close(step(w + 0, x), jax.grad(loop(twin))(w, x))
    with precision(True):
        wide, row = jnp.linspace(0.5, 1.5, BLOCKS, dtype="float64"), x.astype("float64")
        got = jax.jit(jax.grad(loop(jax.checkpoint(torch2jax(Block())))))(wide, row)
        close(got, jax.grad(loop(twin))(wide, row), 1e-12)


def test_an_exception_in_the_recomputed_call(w, x):
    class Raises(Block):
        def __call__(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled() and x.requires_grad and self.armed:
                raise ValueError("the second time")
            return super().__call__(x, w)

        armed = False

    block = Raises()
    run = jax.jit(jax.grad(loop(jax.checkpoint(torch2jax(block))), (0, 1)))
    expected = jax.grad(loop(twin), (0, 1))(w, x)
    close(run(w, x), expected)
    block.armed = True
    with pytest.raises(ERRORS, match="the second time"):
        jax.block_until_ready(run(w, x))
    block.armed = False
    close(run(w, x), expected)
    assert tape_info().entries == 0


def test_threads(w, x):
    run = jax.jit(jax.grad(loop(jax.checkpoint(torch2jax(Block())))))
    grads: list[Any] = []
    threads = [
        threading.Thread(target=lambda k=k: grads.append((k, run(w * k, x)))) for k in range(1, 5)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(grads) == 4
    for k, g in grads:
        close(g, jax.grad(loop(twin))(w * k, x), 1e-4)


@pytest.mark.skipif(jax.device_count() < 2, reason="one device; conftest.py makes more")
def test_several_devices(w):
    block = Block()
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    x = jnp.linspace(0.1, 1.0, 8)

    def spread(f: Callable[..., Any]) -> Callable[..., Any]:
        def local(w: jax.Array, x: jax.Array) -> jax.Array:
            return jax.lax.psum(loop(f)(w, x), "d")

        return jax.shard_map(local, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())

    run = jax.jit(jax.value_and_grad(spread(jax.checkpoint(torch2jax(block))), (0, 1)))
    jax.block_until_ready(run(w, x))
    clear_tape()
    block.reset()
    close(run(w, x), jax.value_and_grad(loop(twin), (0, 1))(w, x))
    assert (block.forward, block.backward) == (4 * BLOCKS, 2 * BLOCKS)
    assert block.most <= 2  # one of each device
    assert tape_info().entries == 0
