"""Under ``lower=True`` the forward mode of an autograd function is the ``jvp`` that it has.

Values are PyTorch's forward mode, or those of a twin in jax.numpy.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from torch2jax import torch2jax


class OldPush(torch.autograd.Function):
    """Its forward mode is twice as large as its reverse mode, so that one can tell them apart."""

    @staticmethod
    def forward(ctx: Any, x: Any, w: Any, factor: Any) -> Any:
        out = x.exp() * w
        ctx.factor = factor
        ctx.save_for_backward(x, w, out)
        ctx.save_for_forward(x, w, out)
        return out, x.argmax()

    @staticmethod
    def backward(ctx: Any, g: Any, _: Any) -> Any:
        x, _, out = ctx.saved_tensors
        return g * out, g * x.exp(), None

    @staticmethod
    def jvp(ctx: Any, x_dot: Any, w_dot: Any, _: Any) -> Any:
        x, _, out = ctx.saved_tensors
        return ctx.factor * (x_dot * out + w_dot * x.exp()), None


class NewPush(torch.autograd.Function):
    @staticmethod
    def forward(x: Any, w: Any, factor: Any) -> Any:
        return x.exp() * w, x.argmax()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.factor = inputs[2]
        ctx.save_for_backward(*inputs[:2], output[0])
        ctx.save_for_forward(*inputs[:2], output[0])
        ctx.mark_non_differentiable(output[1])

    backward, jvp = OldPush.backward, OldPush.jvp


class NoPush(NewPush):
    @staticmethod
    def jvp(*_: Any) -> Any:
        raise NotImplementedError


class PushAlone(NewPush):
    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("reverse mode")


def pushing(function: Any, factor: float) -> Any:
    return lambda x, w: function.apply(x * w, w, factor)[0]


@pytest.mark.parametrize("function", [OldPush, NewPush, PushAlone])
@pytest.mark.parametrize("loop", ["none", "jit", "rows", "scan"])
def test_forward_mode_is_the_functions_jvp(function: Any, loop: str) -> None:
    x, w = torch.tensor([0.3, -0.7]), torch.tensor([1.2, 0.4])
    f = torch2jax(pushing(function, 2.0), lower=True)
    with forward_ad.dual_level():
        dual = pushing(function, 2.0)(forward_ad.make_dual(x, w), forward_ad.make_dual(w, x))
        tangent: Any = forward_ad.unpack_dual(dual).tangent
    a, b = jnp.asarray(x.numpy()), jnp.asarray(w.numpy())
    way = {
        "none": f,
        "jit": jax.jit(f),
        "rows": lambda a, b: jax.vmap(f, (0, None))(jnp.stack([a, a]), b)[1],
        "scan": lambda a, b: jax.lax.scan(lambda c, _: (c, f(c, b)), a, None, 2)[1][1],
    }[loop]
    np.testing.assert_allclose(jax.jvp(way, (a, b), (b, a))[1], tangent, 1e-5)
    np.testing.assert_allclose(jax.linearize(way, a, b)[1](b, a), tangent, 1e-5)
    by_x, by_w = jax.jacfwd(way, (0, 1))(a, b)
    np.testing.assert_allclose(by_x @ b + by_w @ a, tangent, 1e-5)


@pytest.mark.parametrize("function", [OldPush, NewPush, NoPush])
def test_derivatives_of_a_jvp(function: Any) -> None:
    """The jvp has the result, whose derivative in it is the function's own."""
    factor = 1.0
    f = torch2jax(pushing(function, factor), lower=True)
    twin = lambda x, w: jnp.exp(x * w) * w  # noqa: E731
    a, b = jnp.asarray([0.3, -0.7]), jnp.asarray([1.2, 0.4])

    def derivatives(f: Any) -> Any:
        total = lambda x, w: f(x, w).sum() ** 2  # noqa: E731
        push = lambda x, w: jax.jvp(f, (x, w), (w, x))[1]  # noqa: E731
        return (
            push(a, b),
            jax.jvp(push, (a, b), (b, a))[1],
            jax.hessian(total, (0, 1))(a, b),
            jax.jacfwd(jax.jacfwd(total))(a, b),
            jax.grad(lambda x: push(x, b).sum())(a),
            jax.vmap(push, (0, None))(jnp.stack([a, b]), b),
        )

    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, 1e-4, 1e-5),
        derivatives(f),
        derivatives(twin),
    )


def test_a_function_that_has_a_jvp_alone_has_no_reverse_mode() -> None:
    f = torch2jax(pushing(PushAlone, 1.0), lower=True)
    with pytest.raises(NotImplementedError, match="reverse mode"):
        jax.grad(lambda x: f(x, x).sum())(jnp.ones(2))


class NeitherWay(torch.autograd.Function):
    """Its backward pass is not linear, so it is no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g.clamp(-1, 1)

    @staticmethod
    def jvp(*_: Any) -> Any:
        raise RuntimeError("no forward mode here")


def test_an_error_of_a_jvp_is_raised_where_the_backward_pass_is_not_linear() -> None:
    f = torch2jax(lambda x: NeitherWay.apply(x), lower=True)
    with pytest.raises(RuntimeError, match="no forward mode here"):
        jax.jvp(f, (jnp.ones(2),), (jnp.ones(2),))


@pytest.mark.parametrize(
    ("function", "inside"), [(OldPush, "dual"), (NewPush, "dual"), (NewPush, "func")]
)
def test_forward_mode_inside_a_function(function: Any, inside: str) -> None:
    f = pushing(function, 1.0)

    def pushed(x: Any, w: Any) -> Any:
        if inside == "func":
            return torch.func.jvp(f, (x, w), (w * 1, x * 1))[1]
        with forward_ad.dual_level():
            dual = f(forward_ad.make_dual(x, w * 1), forward_ad.make_dual(w, x * 1))
            return forward_ad.unpack_dual(dual).tangent

    def twin(x: Any, w: Any) -> Any:
        return jax.jvp(lambda x, w: jnp.exp(x * w) * w, (x, w), (w, x))[1]

    a, b = jnp.asarray([0.3, -0.7]), jnp.asarray([1.2, 0.4])

    def derivatives(f: Any) -> Any:
        total = lambda x, w: f(x, w).sum()  # noqa: E731
        return f(a, b), jax.grad(total, (0, 1))(a, b), jax.jvp(f, (a, b), (b, a))[1]

    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, 1e-4, 1e-5),
        derivatives(torch2jax(pushed, lower=True)),
        derivatives(twin),
    )
