"""The tape with all sorts of functions, under all sorts of transforms.

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
import torch.utils.checkpoint as checkpoints
from tape_functions import ERRORS, close, through_scan, total, twin

from torch2jax import set_tape_budget, tape_info, torch2jax


class NewStyle(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin() * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx, c):
        x, y = ctx.saved_tensors
        return c * (x.cos() * x + x.sin() + 0 * y)


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.sin() * x
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, c):
        x, y = ctx.saved_tensors
        return c * (x.cos() * x + x.sin() + 0 * y)


class InNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        a = x.detach().numpy()
        return torch.from_numpy(np.sin(a) * a)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, c):
        (x,) = ctx.saved_tensors
        return c * (x.cos() * x + x.sin())


def with_hooks(x):
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda g: g * 1.0)
        handle = y.register_hook(lambda g: g * 5.0)
        handle.remove()
    return y * x


def by_func(x):
    return torch.func.grad(lambda t: (t.sin() - t * t.cos()).sum())(x)  # x sin x


def by_func_vjp(x):
    y, pull = torch.func.vjp(lambda t: t.sin() * t, x)
    (g,) = pull(torch.ones_like(y))
    return y + 0 * g


def by_autograd(x):
    with torch.enable_grad():
        t = x if x.requires_grad else x.detach().requires_grad_()
        (g,) = torch.autograd.grad((t.sin() - t * t.cos()).sum(), t, create_graph=True)
    return g


def by_func_vmap(x):
    return torch.func.vmap(lambda t: t.sin() * t)(x)


def inplace_inside(x):
    y = x.clone()
    y.sin_()
    return y * x


def assembled(x):
    y = torch.zeros_like(x)
    y[:3] = x[:3].sin() * x[:3]
    y[3:] = x[3:].sin() * x[3:]
    return y


def split(x):
    a, b = x.chunk(2)
    return torch.cat([a.sin() * a, b.sin() * b])


def compiled(backend: str) -> Callable[..., Any]:
    @functools.cache
    def make() -> Callable[..., Any]:
        return torch.compile(lambda x: x.sin() * x, backend=backend)

    def fn(x):
        return make()(x)

    return fn


KINDS: dict[str, Callable[..., Any]] = {
    "new_style": NewStyle.apply,
    "old_style": OldStyle.apply,
    "in_numpy": InNumpy.apply,
    "hooks": with_hooks,
    "func_grad": by_func,
    "func_vjp": by_func_vjp,
    "func_vmap": by_func_vmap,
    "autograd_grad": by_autograd,
    "inplace": inplace_inside,
    "assembled": assembled,
    "split": split,
    "identity_view": lambda x: x.view(2, 3).t().t().reshape(6).sin() * x.view(6),
    "expanded": lambda x: (x.expand(3, 6).sin() * x).mean(0),
    "checkpoint": lambda x: checkpoints.checkpoint(lambda t: t.sin() * t, x, use_reentrant=False),
    "reentrant": lambda x: checkpoints.checkpoint(lambda t: t.sin() * t, x, use_reentrant=True),
    "sequential_checkpoint": lambda x: checkpoints.checkpoint_sequential(
        [lambda t: t * 2, lambda t: t / 2, lambda t: t.sin() * t], 2, x, use_reentrant=False
    ),
    "compile_eager": compiled("eager"),
    "compile_aot": compiled("aot_eager"),
    "compile_direct": torch.compile(lambda x: x.sin() * x, backend="aot_eager", dynamic=True),
}

USES: dict[str, Callable[[Any], Any]] = {
    "grad": lambda f: jax.grad(total(f)),
    "jit_grad": lambda f: jax.jit(jax.grad(total(f))),
    "scan": lambda f: jax.jit(jax.grad(through_scan(f, 4))),
    "thrice": lambda f: (
        lambda x: (
            [jax.vjp(f, x)[1](x * k) for k in (1.0, 2.0)]
            + [pull(x * k) for pull in [jax.vjp(f, x)[1]] for k in (1.0, 2.0, 3.0)]
        )
    ),
    "checkpoint": lambda f: jax.jit(jax.grad(total(jax.checkpoint(f)))),
    "jacrev": lambda f: jax.jit(jax.jacrev(f)),
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, x / 2])),
    "vmap_grad": lambda f: lambda x: jax.vmap(jax.grad(total(f)))(jnp.stack([x, x / 2])),
    "grad_vmap": lambda f: lambda x: jax.jit(jax.grad(total(jax.vmap(f))))(jnp.stack([x, x / 2])),
    "constant": lambda f: jax.jit(
        lambda w: jax.lax.scan(
            lambda c, k: (c + jax.grad(lambda w: (f(w) * k).sum())(w), None),
            jnp.zeros_like(w),
            jnp.arange(4.0),
        )[0]
    ),
}


@pytest.mark.parametrize("use", list(USES))
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.usefixtures("quiet")
def test_kinds_of_functions(x, kind, use):
    close(USES[use](torch2jax(KINDS[kind]))(x), USES[use](twin)(x), 5e-5)
    assert tape_info().entries <= 1  # what a loop may use again


@pytest.mark.parametrize(
    "kind", ["new_style", "hooks", "func_grad", "autograd_grad", "inplace", "checkpoint"]
)
@pytest.mark.usefixtures("quiet")
def test_kinds_twice_differentiated(x, kind):
    def twice(f):
        return jax.jit(jax.grad(lambda x: (jax.grad(total(f))(x) ** 2).sum()))

    close(twice(torch2jax(KINDS[kind]))(x), twice(twin)(x), 1e-3)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("in_numpy",)])
@pytest.mark.usefixtures("quiet")
def test_kinds_at_budget_zero_and_by_recompute(x, kind):
    expected = jax.grad(through_scan(twin, 3))(x)
    set_tape_budget(0)
    close(jax.jit(jax.grad(through_scan(torch2jax(KINDS[kind]), 3)))(x), expected, 5e-5)
    f = torch2jax(KINDS[kind], residuals="recompute")
    close(jax.jit(jax.grad(through_scan(f, 3)))(x), expected, 5e-5)
    assert tape_info().entries == 0


@pytest.mark.parametrize("variant", [True, False], ids=["reentrant", "not"])
@pytest.mark.usefixtures("quiet")
def test_checkpoints_leave_closed_over_parameters_alone(x, variant):
    """Tensors that fn closes over get no gradients, neither here nor in the user's objects."""
    w = torch.nn.Parameter(torch.full((6,), 2.0))
    linear = torch.nn.Linear(6, 6)

    def fn(x):
        return checkpoints.checkpoint(lambda t: linear(t * w), x, use_reentrant=variant)

    weight = jnp.asarray(linear.weight.detach().numpy())
    expected = 2 * weight.sum(0)
    f = torch2jax(fn)
    for _ in range(2):
        close(jax.grad(total(f))(x), expected, 1e-4)
        close(jax.jit(jax.grad(total(f)))(x), expected, 1e-4)
    assert w.grad is None
    assert linear.weight.grad is None
    assert linear.bias.grad is None


def test_same_operand_twice(x):
    f = torch2jax(lambda a, b: a.sin() * b + a * b.view(2, 3).t().reshape(6))

    def expected(a, b):
        return jnp.sin(a) * b + a * b.reshape(2, 3).T.reshape(6)

    def scan(f):
        return jax.jit(jax.grad(lambda x: through_scan(lambda c: f(c, c), 4)(x)))

    close(scan(f)(x), scan(expected)(x), 1e-4)
    close(jax.grad(lambda x: f(x, x).sum())(x), jax.grad(lambda x: expected(x, x).sum())(x))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
def test_zero_size(shape, x):
    def fn(e, x):
        return (e.sin() * e).sum() + x.sin() * x, e * 2

    def expected(e, x):
        return (jnp.sin(e) * e).sum() + jnp.sin(x) * x, e * 2

    e = jnp.zeros(shape)
    for f in (torch2jax(fn), torch2jax(fn, depth=1)):
        out = jax.jit(jax.grad(total(f), (0, 1)))(e, x)
        close(out, jax.grad(total(expected), (0, 1))(e, x))
    assert tape_info().entries == 0


def test_two_zero_size_operands(x):
    """Null pointers are all alike: none may stand for another."""
    f = torch2jax(lambda a, b, x: (a.view(0, 1) * b.view(1, 0), x.sin() * x))
    a, b = jnp.zeros((0, 3)), jnp.zeros((5, 0))
    out = jax.grad(lambda a, b, x: sum(y.sum() for y in f(a, b, x)), (0, 1, 2))(a, b, x)
    close(out, (a, b, jax.grad(total(twin))(x)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_dtypes(dtype):
    x = jnp.linspace(0.1, 1.0, 6).astype(dtype)
    if dtype == "complex64":
        x = x * (1 + 0.5j)
    f = torch2jax(lambda x: x.sin() * x)
    tolerance = 2e-5 if dtype == "complex64" else 3e-2
    close(jax.grad(through_scan_real(f))(x), jax.grad(through_scan_real(twin))(x), tolerance)


def through_scan_real(f: Callable[..., Any]) -> Callable[..., Any]:
    def loss(x: jax.Array) -> jax.Array:
        out, _ = jax.lax.scan(lambda c, _: ((f(c) * 0.9).astype(c.dtype), None), x, None, length=3)
        return jnp.real(out).sum()

    return loss


def test_errors_in_the_backward_pass_leave_the_tape_whole(x):
    state = {"fail": True}

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, c):
            if state["fail"]:
                raise RuntimeError("no backward today")
            return c * 2

    f = torch2jax(Fails.apply)
    with pytest.raises(ERRORS, match="no backward today"):
        jax.block_until_ready(jax.grad(total(f))(x))
    state["fail"] = False
    close(jax.grad(total(f))(x), jnp.full(6, 2.0))
    assert tape_info().entries == 0
