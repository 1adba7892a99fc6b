"""Arithmetic and powers make one value from two, in the dtype of PyTorch's promotion."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from .._compat.torch import SHARES_TIES
from .derivative_rules import own_derivative
from .promotion import cast, category, floating, is_inexact, promote, result_dtype, wide
from .registry import lowering
from .unary import unary

Fn = Callable[..., Any]


def both(name: str) -> tuple[str, ...]:
    return (f"{name}.Tensor", f"{name}.Scalar")


def arithmetic(fn: Fn, a: Any, b: Any, to_float: bool = False) -> Any:
    """Compute ``fn`` in the dtype of PyTorch's promotion."""
    dtype = result_dtype(a, b)
    dtype = floating(dtype) if to_float else dtype
    compute = wide(dtype)
    return cast(fn(cast(a, compute), cast(b, compute)), dtype)


@lowering(*both("add"), scalars=True)
def add(self: Any, other: Any, alpha: Any = 1) -> Any:
    return _add(self, other, alpha, jnp.logical_or, lambda a, b: a + b)


def _add(a: Any, b: Any, alpha: Any, on_bools: Fn, fn: Fn) -> Any:
    dtype = result_dtype(a, b)
    if dtype == np.bool_:
        return on_bools(cast(a, bool), cast(b, bool))
    compute = wide(dtype)
    a, b = cast(a, compute), cast(b, compute)
    if not (isinstance(alpha, int) and alpha == 1):
        b = b * cast(alpha, compute)
    return cast(fn(a, b), dtype)


@lowering(*both("sub"), scalars=True)
def sub(self: Any, other: Any, alpha: Any = 1) -> Any:
    return _add(self, other, alpha, jnp.logical_xor, lambda a, b: a - b)


@lowering(*both("rsub"), scalars=True)
def rsub(self: Any, other: Any, alpha: Any = 1) -> Any:
    return sub(other, self, alpha)


@lowering(*both("mul"), "prims.mul", scalars=True)
def mul(self: Any, other: Any) -> Any:
    return arithmetic(lambda a, b: a * b, self, other)


@lowering(*both("div"), scalars=True)
def div(self: Any, other: Any) -> Any:
    return arithmetic(lambda a, b: a / b, self, other, True)


@lowering("div.Tensor_mode", "div.Scalar_mode", scalars=True)
def div_mode(self: Any, other: Any, *, rounding_mode: str | None) -> Any:
    if rounding_mode is None:
        return div(self, other)
    if rounding_mode == "trunc":
        if category(result_dtype(self, other)) == 2:
            return jnp.trunc(div(self, other))  # half precision rounds the quotient first
        return arithmetic(_trunc_divide, self, other)
    return arithmetic(_floor_divide, self, other)


def _trunc_divide(a: Any, b: Any) -> Any:
    return lax.div(*jnp.broadcast_arrays(a, b))


def _floor_divide(a: Any, b: Any) -> Any:
    if not is_inexact(a):
        return jnp.floor_divide(a, b)
    # This is PyTorch's own formula, which differs from floor(a / b) where that is rounded up.
    mod = lax.rem(*jnp.broadcast_arrays(a, b))
    quotient = (a - mod) / b
    quotient = jnp.where((mod != 0) & ((b < 0) != (mod < 0)), quotient - 1, quotient)
    down = jnp.floor(quotient)
    rounded = jnp.where(quotient - down > 0.5, down + 1, down)
    rounded = jnp.where(quotient != 0, rounded, jnp.copysign(jnp.zeros_like(a), a / b))
    return jnp.where(b == 0, a / b, rounded)


@lowering("floor_divide", "floor_divide.Scalar", scalars=True)
def floor_divide(self: Any, other: Any) -> Any:
    return arithmetic(_floor_divide, self, other)


@lowering("remainder.Tensor", "remainder.Scalar", "remainder.Scalar_Tensor", scalars=True)
def remainder(self: Any, other: Any) -> Any:
    return arithmetic(jnp.remainder, self, other)


@lowering(*both("fmod"), "prims.fmod", scalars=True)
def fmod(self: Any, other: Any) -> Any:
    return arithmetic(jnp.fmod, self, other)


@lowering("atan2", "prims.atan2")
def atan2(self: Any, other: Any) -> Any:
    return arithmetic(_atan2, self, other, True)


@own_derivative
def _atan2(y: Any, x: Any) -> Any:
    return jnp.arctan2(y, x)


@_atan2.defjvp
def _atan2_jvp(primals: Any, tangents: Any) -> Any:
    """The derivative is (x dy - y dx) / (x^2 + y^2), and 0 at the origin, as in PyTorch."""
    (y, x), (dy, dx) = primals, tangents
    square = x * x + y * y
    slope = (x * dy - y * dx) / jnp.where(square == 0, 1, square)
    return _atan2(y, x), slope


@lowering("maximum", "prims.maximum")
def maximum(self: Any, other: Any) -> Any:
    return arithmetic(jnp.maximum, self, other)


@lowering("minimum", "prims.minimum")
def minimum(self: Any, other: Any) -> Any:
    return arithmetic(jnp.minimum, self, other)


def _choose(a: Any, b: Any, first: Any, extreme: Any) -> Any:
    """Choose one of two values, which gets all of the derivative; a number comes before NaN.

    From PyTorch 2.14 on equal values share it.
    """
    if SHARES_TIES and is_inexact(b):
        one, other = jnp.where(jnp.isnan(a), b, a), jnp.where(jnp.isnan(b), a, b)
        return extreme(one, other)
    return jnp.where(first | jnp.isnan(b) if category(b.dtype) == 2 else first, a, b)


@lowering("fmax", "prims.fmax")
def fmax(self: Any, other: Any) -> Any:
    return arithmetic(lambda a, b: _choose(a, b, a >= b, jnp.maximum), self, other)


@lowering("fmin", "prims.fmin")
def fmin(self: Any, other: Any) -> Any:
    return arithmetic(lambda a, b: _choose(a, b, a <= b, jnp.minimum), self, other)


@lowering("hypot", "prims.hypot")
def hypot(self: Any, other: Any) -> Any:
    return arithmetic(_hypot, self, other)


@own_derivative
def _hypot(a: Any, b: Any) -> Any:
    return jnp.hypot(a, b)


@_hypot.defjvp
def _hypot_jvp(primals: Any, tangents: Any) -> Any:
    # JAX's own second derivative is another one where the operands are equal.
    (a, b), (da, db), out = primals, tangents, _hypot(*primals)
    return out, a / out * da + b / out * db


@lowering("copysign.Tensor", "copysign.Scalar")
def copysign(self: Any, other: Any) -> Any:
    return arithmetic(_copysign, self, other, True)


@own_derivative
def _copysign(size: Any, sign: Any) -> Any:
    return jnp.copysign(size, sign)


@_copysign.defjvp
def _copysign_jvp(primals: Any, tangents: Any) -> Any:
    """At 0 the derivative is 0, as that of |x| is."""
    out = _copysign(*primals)
    size = primals[0]
    return out, tangents[0] * jnp.where(size == 0, 0, jnp.sign(size) * jnp.sign(out))


@lowering("nextafter", "prims.nextafter")
def nextafter(self: Any, other: Any) -> Any:
    a, b = promote(self, other)
    fixed = lax.stop_gradient(a)
    return a + (jnp.nextafter(fixed, lax.stop_gradient(b)) - fixed)


@lowering("logaddexp")
def logaddexp(self: Any, other: Any) -> Any:
    return arithmetic(log_add_exp, self, other)


@lowering("logaddexp2")
def logaddexp2(self: Any, other: Any) -> Any:
    return arithmetic(_log2_add_exp2, self, other)


def _adding_powers(fn: Fn, log: float) -> Fn:
    """Return ``fn``, whose derivatives by JAX are lost at equal operands in a loop."""

    @own_derivative
    def added(a: Any, b: Any) -> Any:
        return fn(a, b)

    @added.defjvp
    def added_jvp(primals: Any, tangents: Any) -> Any:
        (a, b), (da, db) = primals, tangents
        infinite = (a == b) & jnp.isinf(a)
        apart = jnp.where(infinite, 0, a - b) * log
        slope = lax.logistic(apart) * da + lax.logistic(-apart) * db
        return added(a, b), jnp.where(infinite, 0, slope)

    return lambda a, b: (fn if category(a.dtype) == 3 else added)(*jnp.broadcast_arrays(a, b))


log_add_exp = _adding_powers(jnp.logaddexp, 1)
_log2_add_exp2 = _adding_powers(jnp.logaddexp2, math.log(2))


@lowering("heaviside")
def heaviside(self: Any, values: Any) -> Any:
    return arithmetic(
        lambda a, b: (
            jnp.where(jnp.isnan(a) | (a < 0), 0, jnp.where(a > 0, 1, b)).astype(a.dtype)
            if is_inexact(a)
            else jnp.where(a < 0, 0, jnp.where(a > 0, 1, b)).astype(a.dtype)
        ),
        self,
        values,
    )


@lowering("gcd", "prims.gcd")
def gcd(self: Any, other: Any) -> Any:
    return arithmetic(jnp.gcd, self, other)


@lowering("lcm")
def lcm(self: Any, other: Any) -> Any:
    return arithmetic(jnp.lcm, self, other)


@lowering("ldexp.Tensor")
def ldexp(self: Any, other: Any) -> Any:
    return mul(self, unary(jnp.exp2, True)(other))


# --- powers: exponents are static, so that x ** 2 is a product ------------------------------------


@lowering("pow.Tensor_Scalar")
def pow_scalar(self: Any, exponent: Any) -> Any:
    dtype = result_dtype(self, exponent)
    x = cast(self, wide(dtype))
    if not is_inexact(x) and exponent < 0:
        raise RuntimeError("Integers to negative integer powers are not allowed.")
    if category(dtype) == 2 and exponent == 0.5:
        return cast(jnp.sqrt(x), dtype)
    if isinstance(exponent, float) and exponent.is_integer() and abs(exponent) < 64:
        exponent = int(exponent)
    if isinstance(exponent, int) and not isinstance(exponent, bool):
        return cast(lax.integer_pow(x, exponent), dtype)
    return cast(jnp.power(x, cast(exponent, x.dtype)), dtype)


@lowering("pow.Tensor_Tensor", "pow.Scalar", "prims.pow", "float_power.Tensor_Tensor")
def pow_(self: Any, exponent: Any) -> Any:
    return arithmetic(_power, self, exponent)


def _power(x: Any, y: Any) -> Any:
    if not is_inexact(x):
        # A negative exponent gives 0, except for bases of 1 and -1.
        up = jnp.power(x, jnp.maximum(y, 0))
        unit = jnp.where(x == 1, 1, jnp.where(x == -1, 1 - 2 * (y & 1), 0))
        return jnp.where(y < 0, unit.astype(up.dtype), up)
    if category(x.dtype) == 3:
        return jnp.power(x, y)
    return _real_power(*jnp.broadcast_arrays(x, y))


@own_derivative
def _real_power(x: Any, y: Any) -> Any:
    return lax.pow(x, y)


@_real_power.defjvp
def _real_power_jvp(primals: Any, tangents: Any) -> Any:
    # d x**y = y x**(y-1) dx + x**y log(x) dy, with 0 for the terms at y = 0 and at x = 0, y >= 0.
    (x, y), (dx, dy) = primals, tangents
    out = _real_power(x, y)
    flat = y == 0
    by_x = jnp.where(flat, 0, y * _real_power(x, jnp.where(flat, 1, y - 1)))
    quiet = (x == 0) & (y >= 0)
    by_y = jnp.where(quiet, 0, out * jnp.log(jnp.where(quiet, 1, x)))
    return out, by_x * dx + by_y * dy
