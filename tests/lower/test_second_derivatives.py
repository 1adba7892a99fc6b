"""Second derivatives of autograd functions, with callables among their arguments or without.

Values are PyTorch's, whose backward pass of a backward pass is the user's as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax  # noqa: F401
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, PartitionSpec

from torch2jax import DifferentiationError, TorchCallError, torch2jax

# PyTorch cannot batch old-style functions.
pytestmark = pytest.mark.filterwarnings("ignore:.*is called row by row")


def total(f: Any, a: Any, b: Any) -> Any:
    return sum(f(torch.lerp(a, b, torch.full_like(a, s))) for s in (0.2, 0.9)) * (b - a)


class OldIntegral(torch.autograd.Function):
    """What f uses is passed beside it. The backward pass differentiates f, as PyTorch follows."""

    @staticmethod
    def forward(ctx: Any, f: Any, a: Any, b: Any, *used: Any) -> Any:
        ctx.f = f
        ctx.save_for_backward(a, b, *used)
        return total(f, a, b)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        a, b, *used = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in (a, b)]
            grads = torch.autograd.grad(
                total(ctx.f, *leaves), [*leaves, *used], g, create_graph=True, allow_unused=True
            )
        return None, *grads


class NewIntegral(torch.autograd.Function):
    @staticmethod
    def forward(f: Any, a: Any, b: Any, *used: Any) -> Any:
        return total(f, a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.f = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    backward = OldIntegral.backward


class OldChain(torch.autograd.Function):
    """Two callables: the function and its derivative."""

    @staticmethod
    def forward(ctx: Any, f: Any, slope: Any, x: Any) -> Any:
        ctx.slope = slope
        ctx.save_for_backward(x)
        return f(x)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return None, None, ctx.slope(*ctx.saved_tensors) * g


class NewChain(torch.autograd.Function):
    @staticmethod
    def forward(f: Any, slope: Any, x: Any) -> Any:
        return f(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.slope = inputs[1]
        ctx.save_for_backward(inputs[2])

    backward = OldChain.backward


def integral(function: Any) -> Any:
    def run(w: Any, x: Any) -> Any:
        return function.apply(lambda s: torch.tanh(s * w) + s**3 * w, torch.zeros_like(x), x, w)

    return run


def nested(function: Any) -> Any:
    def run(w: Any, x: Any) -> Any:
        def inner(s: Any) -> Any:
            return function.apply(lambda t: t.sin() * w, torch.zeros_like(s), s * 1.0, w)

        return function.apply(inner, torch.zeros_like(x), x, w)

    return run


def chain(function: Any) -> Any:
    return lambda w, x: function.apply(lambda s: s**3, lambda s: 3 * s**2, x * w) * w.sin()


def closed_over(function: Any) -> Any:
    """PyTorch's first derivative takes the scale for a constant, and the second one does not."""

    def run(w: Any, x: Any) -> Any:
        scale = w.exp()
        slope = lambda s: (s * scale).exp() * scale  # noqa: E731
        by_itself = lambda s: function.apply(slope, lambda s: slope(s) * scale, s)  # noqa: E731
        return function.apply(lambda s: (s * scale).exp(), by_itself, x) + scale

    return run


class Through(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g * (ctx.saved_tensors[0].abs() < 1).to(g.dtype)


class Several(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, i: Any) -> Any:
        ctx.save_for_backward(x, i)
        after = i + 1
        ctx.mark_non_differentiable(after)
        return x[i] * x.sum(), after, x.sin()

    @staticmethod
    def backward(ctx: Any, g: Any, _: Any, h: Any) -> Any:
        x, i = ctx.saved_tensors
        by_rows = torch.zeros_like(x).index_add(0, i, g) * x.sum()
        return by_rows + (g * x[i]).sum() + h * x.cos(), None


class Complex(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return torch.complex(x, x**2) ** 2

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        (x,) = ctx.saved_tensors
        slope = g * (2 * torch.complex(x, x**2)).conj()
        return slope.real + slope.imag * 2 * x


class Written(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x.clone())
        ctx.mark_dirty(x)
        return x.mul_(x)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g * 2 * ctx.saved_tensors[0]


class Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.to(torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g.to(torch.float32)


class Sine(torch.autograd.Function):
    """Its backward pass is a function, too, as those of resampling kernels are."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return SineBackward.apply(g, ctx.saved_tensors[0])


class SineBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Any, x: Any) -> Any:
        ctx.save_for_backward(g, x)
        return g * x.cos()

    @staticmethod
    def backward(ctx: Any, h: Any) -> Any:
        g, x = ctx.saved_tensors
        return h * x.cos(), -h * g * x.sin()


def several(w: Any, x: Any) -> Any:
    rows, _, sine = Several.apply(x * w, torch.tensor([0, 2, 0], device=x.device))
    return rows + sine


def of_complex(w: Any, x: Any) -> Any:
    z = Complex.apply(x * w)
    return z.real + z.imag * w


def with_none(w: Any, x: Any) -> Any:
    return Sine.apply((x * w)[:0]).sum() + x * w


PROGRAMS: dict[str, Callable[..., Any]] = {
    "integral, old": integral(OldIntegral),
    "integral, new": integral(NewIntegral),
    "nested, old": nested(OldIntegral),
    "nested, new": nested(NewIntegral),
    "chain, old": chain(OldChain),
    "chain, new": chain(NewChain),
    "closed over, old": closed_over(OldChain),
    "closed over, new": closed_over(NewChain),
    "straight through": lambda w, x: Through.apply(x * 2) * w,
    "several results": several,
    "complex": of_complex,
    "written": lambda w, x: Written.apply(x * w),
    "bfloat16": lambda w, x: Narrow.apply(x * w).float() * x,
    "its own backward": lambda w, x: Sine.apply(x * w) * w,
    "no rows": with_none,
}
W = np.array([0.3, 0.7, 1.1], np.float32)
X = np.array([0.5, -0.4, 0.2], np.float32)
WHERE = jnp.concatenate([W, X])
WAY = jnp.arange(1.0, 7.0)


def expected(run: Callable[..., Any]) -> tuple[np.ndarray, np.ndarray]:
    w, x = (torch.from_numpy(a.copy()).requires_grad_() for a in (W, X))
    grads = torch.autograd.grad((run(w, x) ** 2).sum(), (w, x), create_graph=True)
    rows = [
        torch.autograd.grad(g, (w, x), retain_graph=True, materialize_grads=True)
        for g in torch.cat(grads)
    ]
    return torch.cat(grads).detach().numpy(), np.array([torch.cat(row).numpy() for row in rows])


def lossy(run: Callable[..., Any], lower: bool) -> Callable[[Any], Any]:
    f = torch2jax(run, lower=lower)
    return lambda z: (f(z[:3], z[3:]) ** 2).sum()


@pytest.mark.parametrize("lower", [False, True], ids=["bridge", "lower"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_second_derivatives(name: str, lower: bool) -> None:
    slope, curvature = expected(PROGRAMS[name])
    loss = lossy(PROGRAMS[name], lower)

    def push(way: Any) -> Any:
        return jax.jvp(jax.grad(loss), (WHERE,), (way,))[1]

    def forward(z: Any) -> Any:
        return jax.jvp(loss, (z,), (WAY,))[1]

    def in_steps(z: Any) -> Any:
        return jax.lax.scan(lambda c, _: (c, loss(c)), z, None, length=2)[1][1]

    def all_ways(z: Any) -> Any:
        return {
            "grad": (jax.grad(loss)(z), slope),
            "reverse over reverse": (jax.jacrev(jax.grad(loss))(z), curvature),
            "forward over reverse": (jax.jvp(jax.grad(loss), (z,), (WAY,))[1], curvature @ WAY),
            "batched": (jax.vmap(push)(jnp.eye(6)), curvature.T),
            "rows": (jax.vmap(jax.grad(loss))(jnp.stack([z, z]))[1], slope),
            "forward": (forward(z), slope @ WAY),
            "forward in rows": (jax.vmap(forward)(jnp.stack([z, z]))[1], slope @ WAY),
            "forward in a scan": (jax.jvp(in_steps, (z,), (WAY,))[1], slope @ WAY),
            "linearized": (jax.linearize(loss, z)[1](WAY), slope @ WAY),
            "columns": (jax.jacfwd(loss)(z), slope),
            "reverse over forward": (jax.grad(forward)(z), curvature @ WAY),
            "forward over forward": (jax.jvp(forward, (z,), (WAY,))[1], WAY @ curvature @ WAY),
        }

    tolerance = 2e-2 if name == "bfloat16" else 1e-3
    for way, (found, want) in jax.jit(all_ways)(WHERE).items():
        np.testing.assert_allclose(found, want, tolerance, tolerance / 10, err_msg=way)


def test_of_a_gradient_in_a_scan() -> None:
    _, curvature = expected(PROGRAMS["its own backward"])
    slope = jax.grad(lossy(PROGRAMS["its own backward"], True))

    def in_steps(z: Any) -> Any:
        return jax.lax.scan(lambda z, _: (z, slope(z)), z, None, length=2)[1][1]

    np.testing.assert_allclose(jax.jit(jax.jacrev(in_steps))(WHERE), curvature, 1e-3, 1e-4)


class Clipped(torch.autograd.Function):
    """Its backward pass is not linear, so it is no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g.clamp(-1, 1)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Any) -> Any:
        return g * 2 * ctx.saved_tensors[0]


class OnceNew(torch.autograd.Function):
    @staticmethod
    def forward(x: Any) -> Any:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    backward = Once.backward


def test_what_is_not_linear_has_derivatives_in_reverse_mode() -> None:
    run = lambda w, x: Clipped.apply(w * x)  # noqa: E731
    loss = lossy(run, True)
    slope, curvature = expected(run)[:2]
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(WHERE), slope, 1e-4, 1e-5)
    np.testing.assert_allclose(jax.jit(jax.jacrev(jax.grad(loss)))(WHERE), curvature, 1e-3, 1e-4)
    for forward in (jax.hessian, jax.jacfwd):
        with pytest.raises(DifferentiationError, match="Clipped has no derivative in forward mode"):
            forward(loss)(WHERE)


@pytest.mark.parametrize("lower", [False, True], ids=["bridge", "lower"])
@pytest.mark.parametrize("function", [Once, OnceNew])
def test_what_is_differentiable_once(function: Any, lower: bool) -> None:
    """PyTorch's second derivative in given leaves is 0, and an error in all others.

    lineax, which this file imports, gives ``stop_gradient`` a transpose for the whole process.
    """
    loss = lossy(lambda w, x: function.apply(w * x), lower)
    twin = jax.grad(lambda z: ((z[:3] * z[3:]) ** 4).sum())
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(WHERE), twin(WHERE), 1e-4, 1e-5)
    refusals = (DifferentiationError, TorchCallError, jax.errors.JaxRuntimeError)
    text = "no second derivative|marked with @once_differentiable|setup_context|the jvp function"
    for again in (jax.jacfwd, jax.jacrev):
        with pytest.raises(refusals, match=text):
            again(jax.grad(loss))(WHERE)
    if not lower:
        with pytest.raises(refusals, match=text):
            jax.jvp(loss, (WHERE,), (WAY,))


class Rounds(torch.autograd.Function):
    """Its derivative is not that of its forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Any, w: Any) -> Any:
        ctx.save_for_backward(x, w)
        return torch.round(x) * w

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        x, w = ctx.saved_tensors
        return g * torch.cos(x) * w, (g * torch.sin(x)).sum_to_size(w.shape)


def rounded(x: Any) -> Any:
    return (Rounds.apply(x * x, x.exp()) ** 2 * x).sum()


def thrice(x: Any, run: Any) -> Any:
    """A loop over its own results."""
    for _ in range(3):
        x = x + 0.01 * run(x)
    return x.sum()


def on_rows(x: Any, run: Any) -> Any:
    return run(x) + run(2 * x)


LOOPS: dict[str, tuple[Any, Any]] = {
    "scan": (
        lambda x, f: jax.lax.scan(lambda c, _: (c + 0.01 * f(c), None), x, None, 3)[0].sum(),
        thrice,
    ),
    "scan of checkpointed": (
        lambda x, f: jax.lax.scan(lambda c, _: (c + 0.01 * jax.checkpoint(f)(c), None), x, None, 3)[
            0
        ].sum(),
        thrice,
    ),
    "map": (lambda x, f: jax.lax.map(f, jnp.stack([x, 2 * x])).sum(), on_rows),
    "vmap": (lambda x, f: jax.vmap(f)(jnp.stack([x, 2 * x])).sum(), on_rows),
    "map of vmap": (
        lambda x, f: jax.lax.map(jax.vmap(f), jnp.stack([x, 2 * x])[None]).sum(),
        on_rows,
    ),
    "cond": (lambda x, f: jax.lax.cond(x[0] > 0, f, jnp.sum, x), lambda x, run: run(x)),
}


@pytest.mark.parametrize("lower", [False, True], ids=["bridge", "lower"])
@pytest.mark.parametrize(("loop", "unrolled"), LOOPS.values(), ids=LOOPS)
def test_in_loops(loop: Any, unrolled: Any, lower: bool) -> None:
    """JAX before 0.12 forgets there what a ``jax.custom_jvp`` says of its second derivative."""
    f, x = torch2jax(rounded, lower=lower), np.asarray([1.2, 2.3], np.float32)
    want = torch.autograd.functional.hessian(
        lambda x: unrolled(x, rounded), torch.from_numpy(x), vectorize=False
    )
    for hessian in (jax.hessian, lambda f: jax.jacrev(jax.jit(jax.grad(f)))):
        np.testing.assert_allclose(hessian(lambda x: loop(x, f))(x), want, 2e-3, 1e-3)


@pytest.mark.parametrize("loop", ["scan", "map"])
def test_what_is_differentiable_once_in_a_loop(loop: str) -> None:
    f = torch2jax(lambda x: (Once.apply(x * x) * x).sum(), lower=True)
    with pytest.raises(DifferentiationError, match="Once has no second derivative"):
        jax.hessian(lambda x: LOOPS[loop][0](x, f))(WHERE)


def test_one_operand_has_rows() -> None:
    """An operand without rows gets those of the others, and its derivative is their sum."""
    f = torch2jax(lambda x, w: (Rounds.apply(x * x, w) ** 2).sum(), lower=True)
    x, w = np.asarray([[1.2, 2.3], [0.3, 3.1]], np.float32), np.asarray([0.7, 1.9], np.float32)
    found = jax.hessian(lambda w: jax.vmap(f, (0, None))(x, w).sum())(w)
    want = torch.autograd.functional.hessian(
        lambda w: (Rounds.apply(torch.from_numpy(x) ** 2, w.expand(2, 2)) ** 2).sum(),
        torch.from_numpy(w),
    )
    np.testing.assert_allclose(found, want, 1e-4, 1e-4)


def test_inside_shard_map() -> None:
    """One operand is on every device, and its gradient is the sum over them."""
    f = torch2jax(lambda x, w: Rounds.apply(x * x, w.tanh()).sum(-1) ** 2, lower=True)
    mesh = Mesh(np.array(jax.devices()[:4]), ("rows",))
    rows, everywhere = PartitionSpec("rows"), PartitionSpec()
    sharded = jax.shard_map(f, mesh=mesh, in_specs=(rows, everywhere), out_specs=rows)
    x, w = jnp.arange(8.0).reshape(4, 2) * 0.3 + 0.1, jnp.asarray([0.7, 1.3])

    def derivatives(f: Any) -> Any:
        total = lambda x, w: f(x, w).sum()  # noqa: E731
        return {
            "grad": jax.grad(total, (0, 1))(x, w),
            "forward": jax.jvp(total, (x, w), (w * x, w)),
            "hessian": jax.hessian(total, 1)(x, w),
            "columns of columns": jax.jacfwd(jax.jacfwd(total, 1), 1)(x, w),
            "checkpoint": jax.grad(jax.checkpoint(total), 1)(x, w),
        }

    found, want = derivatives(sharded), derivatives(f)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-4), found, want)
