"""What a kept graph may hold.

Expected values come from jax.numpy twins; the traps of NOTE [What a kept graph may hold] are shown
to be traps, too: with the guard switched off the same test is wrong.
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
import torch.utils.checkpoint as checkpoints
from tape_functions import ERRORS, close, total

from torch2jax import tape_info, torch2jax
from torch2jax._bridge.torch_side.tape import kept_graph, programs

INPLACE = "modified by an inplace operation"


def bits(n: int) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.arange(n, dtype=jnp.int32), jnp.float32)


def scanned(f: Callable[..., Any], carry: Any, step: Callable[..., Any]) -> Callable[..., Any]:
    """Gradient of a scan whose carry changes in every step, so that XLA uses its buffers again."""

    def loss(w: jax.Array) -> jax.Array:
        def body(c, _):
            y = f(c, w)
            return step(c, y), jnp.real(y * jnp.conj(y)).sum()

        return jax.lax.scan(body, carry, None, length=5)[1].sum()

    return jax.jit(jax.value_and_grad(loss))


def grown(c: jax.Array, y: jax.Array) -> jax.Array:
    return c * 1.3 + 0.1


COMPLEX = jnp.linspace(0.2, 1.0, 6) + 1j * jnp.linspace(1.0, -0.5, 6)
REAL = jnp.linspace(0.2, 1.0, 6)
PAIRS = jnp.linspace(-0.4, 1.0, 12).reshape(6, 2)

# What is saved is a view of c; the gradient is taken in w.
VIEWS: dict[str, tuple[Any, Any, Any, Any]] = {
    "plain": (lambda c, w: c * w, lambda c, w: c * w, REAL, grown),
    "transposed": (
        lambda c, w: c.t()[1:, ::2] * w[:3],
        lambda c, w: c.T[1:, ::2] * w[:3],
        PAIRS,
        grown,
    ),
    "expanded": (
        lambda c, w: c[:1].expand(6) * w,
        lambda c, w: jnp.broadcast_to(c[:1], 6) * w,
        REAL,
        grown,
    ),
    "view_as_complex": (
        lambda c, w: torch.view_as_complex(c) * w,
        lambda c, w: jax.lax.complex(c[:, 0], c[:, 1]) * w,
        PAIRS,
        grown,
    ),
    "view_as_real": (
        lambda c, w: torch.view_as_real(c)[:, 1] * w,
        lambda c, w: c.imag * w,
        COMPLEX,
        grown,
    ),
    "int32": (
        lambda c, w: w.index_select(0, c.view(torch.int32)) * 2,
        lambda c, w: w[jax.lax.bitcast_convert_type(c, jnp.int32)] * 2,
        bits(6)[jnp.array([0, 0, 1, 3, 3, 5])],
        lambda c, y: bits(6)[(jax.lax.bitcast_convert_type(c, jnp.int32) + 2) % 6],
    ),
    "conj": (lambda c, w: c.conj() * w, lambda c, w: c.conj() * w, COMPLEX, grown),
    "neg": (lambda c, w: c.conj().imag * w, lambda c, w: -c.imag * w, COMPLEX, grown),
    "neg_slice": (
        lambda c, w: c.conj().imag[1::2] * w[:3],
        lambda c, w: -c.imag[1::2] * w[:3],
        COMPLEX,
        grown,
    ),
    "conj_t": (
        lambda c, w: c.view(2, 3).mH @ w.view(2, 3).to(c.dtype),
        lambda c, w: c.reshape(2, 3).conj().T @ w.reshape(2, 3).astype(c.dtype),
        COMPLEX,
        grown,
    ),
}


@pytest.mark.parametrize("name", list(VIEWS))
def test_saved_views_in_a_scan(name):
    fn, expected, carry, step = VIEWS[name]
    fn.__qualname__ = f"saves_view_{name}"
    before = tape_info()
    out = scanned(torch2jax(fn), carry, step)(REAL)
    close(out, scanned(expected, carry, step)(REAL), 1e-4)
    assert tape_info().hits == before.hits + 5
    assert tape_info().misses == before.misses
    assert fn.__qualname__ not in tape_info().on_copies
    assert tape_info().entries == 0


@pytest.mark.parametrize("name", list(VIEWS))
def test_small_graphs_of_views_in_a_scan(name, small):
    fn, expected, carry, step = VIEWS[name]
    out = scanned(wrapped_anew(fn), carry, step)(REAL)
    close(out, scanned(expected, carry, step)(REAL), 1e-4)


def naive_is_wrong(run: Callable[[], Any], expected: Any) -> None:
    """Without its guard, the same computation fails or is wrong."""
    try:
        out = jax.block_until_ready(run())
    except ERRORS:
        return
    with pytest.raises(AssertionError):
        close(out, expected, 1e-3)


def wrapped_anew(fn: Callable[..., Any]) -> Any:
    """fn as another function, whose callables remember nothing."""
    anew = lambda *xs: fn(*xs)  # noqa: E731
    anew.__qualname__ = f"anew_{id(anew)}"
    return torch2jax(anew)


def ignoring_bits(view: Any) -> torch.Tensor:
    x = view.saved.operands[view.operand]
    if x.dtype is view.dtype:
        return x.as_strided(view.size, view.stride, view.offset)
    t = torch.empty(0, dtype=view.dtype)
    return t.set_(x.untyped_storage(), view.offset, view.size, view.stride)


def same_dtype_only(source: Any, t: torch.Tensor) -> Any:
    """Finds views of the operands' own dtypes alone."""
    index = source.by_address.get(t.untyped_storage().data_ptr())
    if index is not None and t.dtype is not source.operands[index].dtype:
        return lambda: t
    return pack(source, t)


pack = kept_graph.SavedTensors.pack


@pytest.mark.parametrize("name", ["conj", "neg", "neg_slice", "conj_t"])
def test_trap_a_naive_bits(name, monkeypatch):
    fn, expected, carry, step = VIEWS[name]
    monkeypatch.setattr(kept_graph._View, "__call__", ignoring_bits)
    want = scanned(expected, carry, step)(REAL)
    naive_is_wrong(lambda: scanned(wrapped_anew(fn), carry, step)(REAL), want)


@pytest.mark.parametrize("name", ["view_as_complex", "int32"])
def test_trap_a_naive_dtypes(name, monkeypatch):
    fn, expected, carry, step = VIEWS[name]
    monkeypatch.setattr(programs, "referenced_elsewhere", lambda *_: False)
    monkeypatch.setattr(kept_graph.SavedTensors, "pack", same_dtype_only)
    want = scanned(expected, carry, step)(REAL)
    naive_is_wrong(lambda: scanned(wrapped_anew(fn), carry, step)(REAL), want)


def exp_then_add(x):
    y = x.exp()
    y.add_(1)
    return y


def saved_input_then_mul(x):
    y = x.clone()
    z = y.sin()
    y.mul_(2)
    return z + y


def saved_view_then_fill(x):
    y = x * 1.0
    z = y[::2] * y[1::2]
    y[0] = 0.0
    return z


@pytest.mark.parametrize("fn", [exp_then_add, saved_input_then_mul, saved_view_then_fill])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_trap_b_inplace_after_save(x, fn, jit):
    maybe = jax.jit if jit else (lambda f: f)
    leaf = torch.ones(6, requires_grad=True)
    with pytest.raises(RuntimeError, match=INPLACE):
        fn(leaf).sum().backward()
    with pytest.raises(ERRORS, match=INPLACE):
        jax.block_until_ready(maybe(jax.grad(total(torch2jax(fn))))(x))
    close(torch2jax(fn)(x), jnp.asarray(fn(torch.from_numpy(np.array(x))).numpy()))


@pytest.mark.parametrize("fn", [exp_then_add, saved_input_then_mul, saved_view_then_fill])
def test_trap_b_naive(x, fn, monkeypatch):
    monkeypatch.setattr(kept_graph, "_torchs_own", lambda t, version: t)
    jax.block_until_ready(jax.grad(total(wrapped_anew(fn)))(x))  # no error: silently wrong


def test_inplace_that_torch_allows(x):
    def fn(x):
        y = x.sin()
        y.add_(1)  # sin saved its input, not its output
        z = y.exp()
        z = z * 2
        z.mul_(3)
        return z

    def expected(x):
        return 6 * jnp.exp(jnp.sin(x) + 1)

    close(jax.jit(jax.grad(total(torch2jax(fn))))(x), jax.grad(total(expected))(x), 1e-4)


def holder(hold: Callable[..., Any], use: Callable[..., Any]) -> Any:
    class Holder(torch.autograd.Function):
        @staticmethod
        def forward(ctx, c, w):
            ctx.held = hold(c)
            return c * w

        @staticmethod
        def backward(ctx, g):
            held = use(ctx.held)
            return None, held * g

    return Holder.apply


def hooked(c, w):
    y = w * 1.0
    if y.requires_grad:
        y.register_hook(lambda g: g * c)
    return y * 1.0 + (c - 1.0) * w.detach()


def hooked_grad_fn(c, w):
    y = w * 1.0
    if y.requires_grad:
        y.grad_fn.register_hook(lambda ins, outs: (ins[0] * c, *ins[1:]))
    return y * 1.0 + (c - 1.0) * w.detach()


def own_hooks(c, w):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return c * w


def on_cpu_hooks(c, w):
    with torch.autograd.graph.save_on_cpu():
        return c * w


# Each is c * w, and holds c outside of saved tensors.
HELD: dict[str, Callable[..., Any]] = {
    "ctx": holder(lambda c: c, lambda h: h),
    "view": holder(lambda c: c.view(-1, 2), lambda h: h.view(-1)),
    "detached": holder(lambda c: c.detach(), lambda h: h),
    "data": holder(lambda c: c.data, lambda h: h),
    "dict": holder(lambda c: {"c": [c[:3], c[3:]]}, lambda h: torch.cat(h["c"])),
    "numpy": holder(lambda c: c.detach().numpy(), torch.from_numpy),
    "dlpack": holder(torch.utils.dlpack.to_dlpack, torch.utils.dlpack.from_dlpack),
    "int": holder(lambda c: c.view(torch.int32), lambda h: h.view(torch.float32)),
    "storage": holder(
        lambda c: c.untyped_storage(), lambda h: torch.tensor([], dtype=torch.float32).set_(h)
    ),
    "partial": holder(lambda c: functools.partial(torch.mul, c), lambda h: h(1.0)),
    "hook": hooked,
    "node_hook": hooked_grad_fn,
    "own_hooks": own_hooks,
    "checkpoint": lambda c, w: checkpoints.checkpoint(lambda w: c * w, w, use_reentrant=False),
    "reentrant": lambda c, w: checkpoints.checkpoint(lambda w: c * w, w, use_reentrant=True),
    "reentrant_arg": lambda c, w: checkpoints.checkpoint(
        lambda c, w: c * w, c, w, use_reentrant=True
    ),
}


@pytest.mark.parametrize("name", list(HELD))
@pytest.mark.usefixtures("quiet")
def test_trap_c_held_outside_of_saved_tensors(name):
    f = wrapped_anew(HELD[name])
    expected = scanned(lambda c, w: c * w, REAL, grown)(REAL)
    run = scanned(f, REAL, grown)
    for _ in range(2):  # the first call makes the choice, the later ones keep it
        close(run(REAL), expected, 1e-4)
    assert f._label in tape_info().on_copies
    assert tape_info().entries == tape_info().bytes == 0


# (The arguments of a reentrant checkpoint are saved tensors.)
@pytest.mark.parametrize("name", [name for name in HELD if name != "reentrant_arg"])
@pytest.mark.usefixtures("quiet")
def test_trap_c_naive(name, monkeypatch):
    monkeypatch.setattr(programs, "referenced_elsewhere", lambda *_: False)
    expected = scanned(lambda c, w: c * w, REAL, grown)(REAL)
    naive_is_wrong(lambda: scanned(wrapped_anew(HELD[name]), REAL, grown)(REAL), expected)


def test_held_from_the_second_call_on():
    """The first call holds nothing: the choice must not be final."""
    hold = HELD["view"]

    def fn(c, w):
        return hold(c, w) if float(c[0].detach()) > 0.3 else c * w

    f = torch2jax(fn, REAL, REAL)
    out = scanned(f, REAL, grown)(REAL)
    close(out, scanned(lambda c, w: c * w, REAL, grown)(REAL), 1e-4)


def test_own_saving_hooks_that_copy():
    out = scanned(wrapped_anew(on_cpu_hooks), REAL, grown)(REAL)
    close(out, scanned(lambda c, w: c * w, REAL, grown)(REAL), 1e-4)


def test_one_array_twice_held():
    """Two operands may be one buffer."""
    hold = HELD["view"]
    f = wrapped_anew(hold)

    def loss(f):
        def run(x):
            def body(c, _):
                return f(c, c), None

            return jax.lax.scan(body, x, None, length=4)[0].sum()

        return run

    # The Function above has no gradient for c: so has the twin.
    out = jax.jit(jax.grad(loss(f)))(REAL)
    expected = jax.grad(loss(lambda c, w: jax.lax.stop_gradient(c) * w))(REAL)
    close(out, expected, 1e-4)


def test_operand_that_shares_memory_with_a_closed_over_tensor():
    """A torch tensor may lie in the memory of an operand and have a history of its own."""
    w = torch.ones(1024)
    w.mul_(2.0)  # version 1
    x = jnp.from_dlpack(w)
    f = torch2jax(lambda x: x * w)
    close(jax.grad(total(f))(x), jnp.full(1024, 2.0))
