"""These are activations, and their derivatives for ``backward()``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .binary import log_add_exp
from .derivative_rules import own_derivative
from .promotion import cast, wide
from .registry import lowering
from .unary import unary

Fn = Callable[..., Any]


def _activation(*names: str) -> Callable[[Fn], Fn]:
    """Register a function of a tensor and numbers, computed in float32 for half precision."""

    def register(fn: Fn) -> Fn:
        def lowered(self: Any, *numbers: Any, **named: Any) -> Any:
            return cast(fn(cast(self, wide(self.dtype)), *numbers, **named), self.dtype)

        lowering(*names)(lowered)
        return lowered

    return register


@own_derivative
def rectified(x: Any) -> Any:
    return lax.max(x, jnp.zeros((), x.dtype))


@rectified.defjvp
def _rectified_jvp(primals: Any, tangents: Any) -> Any:
    # At 0 the derivative is 0, as in PyTorch. That of max would be a half.
    (x,), (dx,) = primals, tangents
    return rectified(x), jnp.where(x > 0, dx, jnp.zeros((), dx.dtype))


lowering("relu", "prims.relu")(unary(rectified, False))


@_activation("gelu")
def gelu(x: Any, *, approximate: str = "none") -> Any:
    return jax.nn.gelu(x, approximate=True) if approximate == "tanh" else _gelu(x)


@jax.custom_jvp
def _gelu(x: Any) -> Any:
    return x * _normal_cdf(x)


@_gelu.defjvp
def _gelu_jvp(primals: Any, tangents: Any) -> Any:
    # The slope is one array to keep for the backward pass. JAX's own derivative keeps three.
    (x,), (dx,) = primals, tangents
    return _gelu(x), _gelu_slope(x) * dx


def _gelu_slope(x: Any) -> Any:
    # (x cdf(x))' = cdf(x) + x pdf(x)
    return _normal_cdf(x) + x * (jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi)))


def _normal_cdf(x: Any) -> Any:
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))


@_activation("silu")
def silu(x: Any) -> Any:
    return x * lax.logistic(x)


@_activation("mish")
def mish(x: Any) -> Any:
    return x * jnp.tanh(log_add_exp(x, jnp.zeros_like(x)))


@_activation("hardtanh")
def hardtanh(x: Any, min_val: Any = -1, max_val: Any = 1) -> Any:
    # Its derivative is 0 at the bounds, as in PyTorch's hardtanh_backward.
    inside = (x > min_val) & (x < max_val)
    return jnp.where(inside | jnp.isnan(x), x, lax.stop_gradient(jnp.clip(x, min_val, max_val)))


@_activation("hardsigmoid")
def hardsigmoid(x: Any) -> Any:
    inside = (x > -3) & (x < 3)
    return jnp.where(inside, x / 6 + 0.5, lax.stop_gradient(jnp.clip(x / 6 + 0.5, 0, 1)))


@_activation("hardswish")
def hardswish(x: Any) -> Any:
    return jnp.where(x <= -3, 0 * x, jnp.where(x >= 3, x, x * (x + 3) / 6))


@_activation("leaky_relu")
def leaky_relu(x: Any, negative_slope: Any = 0.01) -> Any:
    return jnp.where(x > 0, x, x * negative_slope)


@_activation("elu")
def elu(x: Any, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Any:
    # At 0 it is a line, so that its second derivative there is 0, as in PyTorch.
    low = jnp.where(x < 0, x, 0.0) * input_scale
    below = jnp.where(x < 0, jnp.expm1(low), x * input_scale) * (alpha * scale)
    return jnp.where(x > 0, x * scale, below)


@_activation("celu")
def celu(x: Any, alpha: Any = 1.0) -> Any:
    return elu(x, alpha, 1, 1 / alpha)


@_activation("softplus")
def softplus(x: Any, beta: Any = 1, threshold: Any = 20) -> Any:
    big = x * beta > threshold
    return jnp.where(big, x, jnp.log1p(jnp.exp(jnp.where(big, 0.0, x * beta))) / beta)


@_activation("softshrink")
def softshrink(x: Any, lambd: Any = 0.5) -> Any:
    return jnp.where(x > lambd, x - lambd, jnp.where(x < -lambd, x + lambd, x * 0))


@_activation("hardshrink")
def hardshrink(x: Any, lambd: Any = 0.5) -> Any:
    return jnp.where((x >= -lambd) & (x <= lambd), 0, x)


@_activation("threshold")
def threshold(x: Any, threshold: Any, value: Any) -> Any:
    return jnp.where(x <= threshold, jnp.asarray(value, x.dtype), x)


@lowering("log_sigmoid_forward")
def log_sigmoid_forward(self: Any) -> Any:
    x = cast(self, wide(self.dtype))
    return cast(-log_add_exp(-x, jnp.zeros_like(x)), self.dtype), jnp.zeros((0,), self.dtype)


@lowering("log_sigmoid")
def log_sigmoid(self: Any) -> Any:
    return log_sigmoid_forward(self)[0]


@lowering("glu")
def glu(self: Any, dim: int = -1) -> Any:
    a, b = jnp.split(cast(self, wide(self.dtype)), 2, axis=dim)
    return cast(a * lax.logistic(b), self.dtype)


@lowering("_prelu_kernel")
def prelu(self: Any, weight: Any) -> Any:
    return jnp.where(self > 0, self, self * weight)


# --- derivatives for backward() ------------------------------------------------------------------


@lowering("threshold_backward")
def threshold_backward(grad_output: Any, self: Any, threshold: Any) -> Any:
    return jnp.where(self <= threshold, jnp.zeros((), grad_output.dtype), grad_output)


@lowering("sigmoid_backward")
def sigmoid_backward(grad_output: Any, output: Any) -> Any:
    g, y = grad_output, jnp.conj(output)
    return g * (y * (1 - y))


@lowering("tanh_backward")
def tanh_backward(grad_output: Any, output: Any) -> Any:
    y = jnp.conj(output)
    return grad_output * (1 - y * y)


@lowering("gelu_backward")
def gelu_backward(grad_output: Any, self: Any, *, approximate: str = "none") -> Any:
    compute = wide(self.dtype)
    x, g = cast(self, compute), cast(grad_output, compute)
    if approximate == "tanh":
        _, pull = jax.vjp(lambda x: jax.nn.gelu(x, approximate=True), x)
        return cast(pull(g)[0], self.dtype)
    return cast(g * _gelu_slope(x), self.dtype)


@lowering("silu_backward")
def silu_backward(grad_output: Any, self: Any) -> Any:
    compute = wide(self.dtype)
    x, g = cast(self, compute), cast(grad_output, compute)
    s = lax.logistic(x)
    return cast(g * s * (1 + x * (1 - s)), self.dtype)
