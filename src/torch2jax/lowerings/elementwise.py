"""One value from one value, or from one of each operand.

Half precision is computed in float32, as PyTorch's kernels do; integers become floating where
PyTorch's result is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from jax.scipy import special

from .registry import (
    carried,
    cast,
    floating,
    is_float,
    is_inexact,
    kind,
    lowering,
    promote,
    result_dtype,
    wide,
)

Fn = Callable[..., Any]

# --- (Tensor self) -> Tensor ---------------------------------------------------------------------


def _unary(fn: Fn, to_float: bool) -> Fn:
    def lowered(self: Any) -> Any:
        dtype = floating(self.dtype) if to_float else self.dtype
        return cast(fn(cast(self, wide(dtype))), dtype)

    return lowered


def _sinc(x: Any) -> Any:
    y = jnp.pi * x
    safe = jnp.where(x == 0, 1.0, y)
    return jnp.where(x == 0, 1.0, jnp.sin(safe) / safe)


def _logit(x: Any) -> Any:
    return jnp.log(x / (1 - x))


def _sigmoid(x: Any) -> Any:
    return lax.logistic(x)


def _tan(x: Any) -> Any:
    return lax.tan(x)


_FLOATING: dict[str, Fn] = {
    "acos": jnp.arccos,
    "acosh": jnp.arccosh,
    "asin": jnp.arcsin,
    "asinh": jnp.arcsinh,
    "atan": jnp.arctan,
    "atanh": jnp.arctanh,
    "cos": jnp.cos,
    "cosh": jnp.cosh,
    "deg2rad": lambda x: x * (math.pi / 180),
    "digamma": lambda x: _digamma(x),
    "erf": lax.erf,
    "erfc": lax.erfc,
    "erfinv": lax.erf_inv,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "i0": special.i0,
    "lgamma": lax.lgamma,
    "log": jnp.log,
    "log10": jnp.log10,
    "log1p": jnp.log1p,
    "log2": jnp.log2,
    "rad2deg": lambda x: x * (180 / math.pi),
    "reciprocal": lambda x: 1 / x,
    "rsqrt": lax.rsqrt,
    "sigmoid": _sigmoid,
    "sin": jnp.sin,
    "sinc": _sinc,
    "sinh": jnp.sinh,
    "special_entr": special.entr,
    "special_erfcx": lambda x: _erfcx(x),
    "special_i0e": special.i0e,
    "special_i1": special.i1,
    "special_i1e": special.i1e,
    "special_log_ndtr": special.log_ndtr,
    "special_ndtri": special.ndtri,
    "sqrt": jnp.sqrt,
    "tan": _tan,
    "tanh": jnp.tanh,
}


def _digamma(x: Any) -> Any:
    # Below 0 by reflection, psi(x) = psi(1 - x) - pi / tan(pi x), from the distance to the pole.
    below = x < 0
    off = x - jnp.round(x)
    tangent = jnp.tan(jnp.pi * jnp.where(below, off, 0.25))
    y = special.digamma(jnp.where(x == 0, 1, jnp.where(below, 1 - x, x)))
    y = y - jnp.where(below, jnp.pi / tangent, 0)
    y = jnp.where(below & (off == 0), jnp.nan, y)
    return jnp.where(x == 0, jnp.copysign(jnp.inf, -x), y)


def _trigamma(x: Any) -> Any:
    # psi'(x) = pi^2 / sin(pi x)^2 - psi'(1 - x).
    below = x < 0.5
    sine = jnp.sin(jnp.pi * jnp.where(below, x - jnp.round(x), 0.25))
    y = special.polygamma(1, jnp.where(below, 1 - x, x))
    return jnp.where(below, (jnp.pi / sine) ** 2 - y, y)


def _erfcx(x: Any) -> Any:
    # exp(x^2) erfc(x); for large x by its asymptotic series, where the product is inf * 0.
    big = x > 5
    small = jnp.where(big, 0.0, x)
    z = 1 / jnp.where(big, x * x, 1.0)
    series = 1 - z / 2 * (1 - 3 * z / 2 * (1 - 5 * z / 2 * (1 - 7 * z / 2)))
    tail = series / (jnp.where(big, x, 1.0) * math.sqrt(math.pi))
    return jnp.where(big, tail, jnp.exp(small * small) * lax.erfc(small))


def _same_for_integers(fn: Fn) -> Fn:
    return lambda x: fn(x) if is_inexact(x) else x


def _frac(x: Any) -> Any:
    return x - jnp.trunc(x)


def _sgn(x: Any) -> Any:
    return jnp.sign(x)


_SAME: dict[str, Fn] = {
    "bitwise_not": jnp.bitwise_not,
    "ceil": _same_for_integers(jnp.ceil),
    "conj_physical": jnp.conj,
    "floor": _same_for_integers(jnp.floor),
    "frac": _frac,
    "neg": jnp.negative,
    "positive": lambda x: x,
    "round": _same_for_integers(jnp.round),
    "sgn": _sgn,
    "sign": jnp.sign,
    "square": jnp.square,
    "trunc": _same_for_integers(jnp.trunc),
}


@jax.custom_jvp
def _relu(x: Any) -> Any:
    return lax.max(x, jnp.zeros((), x.dtype))


@_relu.defjvp
def _relu_jvp(primals: Any, tangents: Any) -> Any:
    # At 0 the derivative is 0, as in PyTorch; that of max is a half.
    (x,), (dx,) = primals, tangents
    return _relu(x), jnp.where(x > 0, dx, jnp.zeros((), dx.dtype))


_SAME["relu"] = _relu

for _name, _fn in _FLOATING.items():
    lowering(_name, f"prims.{_name}")(_unary(_fn, True))
for _name, _fn in _SAME.items():
    lowering(_name, f"prims.{_name}")(_unary(_fn, False))
for _name, _fn in {
    "prims.erf_inv": lax.erf_inv,
    "prims.bessel_i0": special.i0,
    "prims.bessel_i0e": special.i0e,
    "prims.bessel_i1": special.i1,
    "prims.bessel_i1e": special.i1e,
    "prims.ndtri": special.ndtri,
    "prims.erfcx": _erfcx,
    "prims.cbrt": jnp.cbrt,
}.items():
    lowering(_name)(_unary(_fn, True))


@lowering("abs", "prims.abs")
def abs_(self: Any) -> Any:
    if kind(self.dtype) == 3:
        return _complex_abs(self)
    return self if kind(self.dtype) == 0 else _abs(self)


@jax.custom_jvp
def _abs(x: Any) -> Any:
    return lax.abs(x)


@_abs.defjvp
def _abs_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    return _abs(x), dx * jnp.sign(x).astype(dx.dtype)


def _complex_abs(x: Any) -> Any:
    # The derivative at 0 is 0, as in PyTorch, not NaN.
    zero = x == 0
    return jnp.where(zero, 0, jnp.abs(jnp.where(zero, 1, x)))


@lowering("angle")
def angle(self: Any) -> Any:
    if kind(self.dtype) == 3:
        zero = self == 0
        return jnp.where(zero, 0, jnp.angle(jnp.where(zero, 1, self)))
    x = cast(self, floating(self.dtype))
    return jnp.where(jnp.isnan(x), x, jnp.where(x < 0, jnp.asarray(jnp.pi, x.dtype), 0 * x))


@lowering("real", "prims.real")
def real(self: Any) -> Any:
    return self.real


@lowering("imag", "prims.imag")
def imag(self: Any) -> Any:
    return self.imag


@lowering("prims.conj")
def prims_conj(self: Any) -> Any:
    return jnp.conj(self)


@lowering("isnan")
def isnan(self: Any) -> Any:
    return jnp.isnan(self) if is_inexact(self) else jnp.zeros(self.shape, bool)


@lowering("isinf")
def isinf(self: Any) -> Any:
    return jnp.isinf(self) if is_inexact(self) else jnp.zeros(self.shape, bool)


@lowering("isfinite", "prims.isfinite")
def isfinite(self: Any) -> Any:
    return jnp.isfinite(self) if is_inexact(self) else jnp.ones(self.shape, bool)


@lowering("isposinf")
def isposinf(self: Any) -> Any:
    return self == jnp.inf if is_inexact(self) else jnp.zeros(self.shape, bool)


@lowering("isneginf")
def isneginf(self: Any) -> Any:
    return self == -jnp.inf if is_inexact(self) else jnp.zeros(self.shape, bool)


@lowering("signbit", "prims.signbit")
def signbit(self: Any) -> Any:
    return jnp.signbit(self) if is_float(self) else self < 0


@lowering("logical_not")
def logical_not(self: Any) -> Any:
    return self == 0 if self.dtype != bool else ~self


@lowering("round.decimals")
def round_decimals(self: Any, *, decimals: int) -> Any:
    if not is_inexact(self):
        return self
    x = cast(self, wide(self.dtype))
    scale = 10.0 ** abs(decimals)
    y = jnp.round(x * scale) / scale if decimals > 0 else jnp.round(x / scale) * scale
    return cast(y if decimals else jnp.round(x), self.dtype)


@lowering("logit")
def logit(self: Any, eps: float | None = None) -> Any:
    dtype = floating(self.dtype)
    x = cast(self, wide(dtype))
    if eps is not None:
        x = jnp.clip(x, eps, 1 - eps)
    return cast(_logit(x), dtype)


@lowering("nan_to_num")
def nan_to_num(
    self: Any, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Any:
    if not is_inexact(self):
        return self
    if kind(self.dtype) == 3:
        return lax.complex(
            nan_to_num(self.real, nan, posinf, neginf), nan_to_num(self.imag, nan, posinf, neginf)
        )
    return jnp.nan_to_num(self, nan=0.0 if nan is None else nan, posinf=posinf, neginf=neginf)


@lowering("frexp.Tensor", int32=True)
def frexp(self: Any) -> Any:
    mantissa, exponent = jnp.frexp(self)
    return mantissa, exponent.astype(np.int32)


@lowering("prims.convert_element_type")
def convert_element_type(a: Any, dtype: torch.dtype) -> Any:
    return cast(a, carried(dtype))


@lowering("clone", "prims.clone", "lift_fresh_copy", "alias_copy", "detach_copy", "resolve_conj")
def clone(self: Any, *, memory_format: Any = None) -> Any:
    return self


@lowering("copy")
def copy(self: Any, src: Any, non_blocking: bool = False) -> Any:
    return jnp.broadcast_to(cast(src, self.dtype), self.shape)


@lowering("polygamma")
def polygamma(n: int, self: Any) -> Any:
    dtype = floating(self.dtype)
    x = cast(self, wide(dtype))
    if n < 2:
        return cast(_trigamma(x) if n else _digamma(x), dtype)
    return cast(_polygamma(n, x), dtype)


def _polygamma(n: int, x: Any) -> Any:
    # psi_n(x) = psi_n(x + 1) - (-1)^n n! / x^(n + 1), up to where the series is good (x >= 1).
    total, y = jnp.zeros_like(x), x
    for _ in range(32):
        below = y < 1
        total = total + jnp.where(below, jnp.where(below, y, 1.0) ** -(n + 1), 0)
        y = jnp.where(below, y + 1, y)
    return special.polygamma(n, y) - (-1) ** n * math.factorial(n) * total


# --- (Tensor self, Tensor other) -> Tensor -------------------------------------------------------


def _both(name: str) -> tuple[str, ...]:
    return (f"{name}.Tensor", f"{name}.Scalar")


def _arithmetic(fn: Fn, a: Any, b: Any, to_float: bool = False) -> Any:
    """``fn`` in the dtype of PyTorch's promotion."""
    dtype = result_dtype(a, b)
    dtype = floating(dtype) if to_float else dtype
    compute = wide(dtype)
    return cast(fn(cast(a, compute), cast(b, compute)), dtype)


@lowering(*_both("add"), scalars=True)
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


@lowering(*_both("sub"), scalars=True)
def sub(self: Any, other: Any, alpha: Any = 1) -> Any:
    return _add(self, other, alpha, jnp.logical_xor, lambda a, b: a - b)


@lowering(*_both("rsub"), scalars=True)
def rsub(self: Any, other: Any, alpha: Any = 1) -> Any:
    return sub(other, self, alpha)


@lowering(*_both("mul"), "prims.mul", scalars=True)
def mul(self: Any, other: Any) -> Any:
    return _arithmetic(lambda a, b: a * b, self, other)


@lowering(*_both("div"), scalars=True)
def div(self: Any, other: Any) -> Any:
    return _arithmetic(lambda a, b: a / b, self, other, True)


@lowering("div.Tensor_mode", "div.Scalar_mode", scalars=True)
def div_mode(self: Any, other: Any, *, rounding_mode: str | None) -> Any:
    if rounding_mode is None:
        return div(self, other)
    if rounding_mode == "trunc":
        return _arithmetic(_trunc_divide, self, other)
    return _arithmetic(_floor_divide, self, other)


def _trunc_divide(a: Any, b: Any) -> Any:
    return jnp.trunc(a / b) if is_inexact(a) else lax.div(*jnp.broadcast_arrays(a, b))


def _floor_divide(a: Any, b: Any) -> Any:
    if not is_inexact(a):
        return jnp.floor_divide(a, b)
    # PyTorch's own formula, which differs from floor(a / b) where that is rounded up.
    mod = lax.rem(*jnp.broadcast_arrays(a, b))
    quotient = (a - mod) / b
    quotient = jnp.where((mod != 0) & ((b < 0) != (mod < 0)), quotient - 1, quotient)
    down = jnp.floor(quotient)
    rounded = jnp.where(quotient - down > 0.5, down + 1, down)
    rounded = jnp.where(quotient != 0, rounded, jnp.copysign(jnp.zeros_like(a), a / b))
    return jnp.where(b == 0, a / b, rounded)


@lowering("floor_divide", "floor_divide.Scalar", scalars=True)
def floor_divide(self: Any, other: Any) -> Any:
    return _arithmetic(_floor_divide, self, other)


@lowering("remainder.Tensor", "remainder.Scalar", "remainder.Scalar_Tensor", scalars=True)
def remainder(self: Any, other: Any) -> Any:
    return _arithmetic(jnp.remainder, self, other)


@lowering(*_both("fmod"), "prims.fmod", scalars=True)
def fmod(self: Any, other: Any) -> Any:
    return _arithmetic(jnp.fmod, self, other)


@lowering("atan2", "prims.atan2")
def atan2(self: Any, other: Any) -> Any:
    return _arithmetic(jnp.arctan2, self, other, True)


@lowering("maximum", "prims.maximum")
def maximum(self: Any, other: Any) -> Any:
    return _arithmetic(jnp.maximum, self, other)


@lowering("minimum", "prims.minimum")
def minimum(self: Any, other: Any) -> Any:
    return _arithmetic(jnp.minimum, self, other)


@lowering("fmax", "prims.fmax")
def fmax(self: Any, other: Any) -> Any:
    return _arithmetic(jnp.fmax, self, other)


@lowering("fmin", "prims.fmin")
def fmin(self: Any, other: Any) -> Any:
    return _arithmetic(jnp.fmin, self, other)


@lowering("hypot", "prims.hypot")
def hypot(self: Any, other: Any) -> Any:
    return _arithmetic(jnp.hypot, self, other)


@lowering("copysign.Tensor", "copysign.Scalar")
def copysign(self: Any, other: Any) -> Any:
    return _arithmetic(jnp.copysign, self, other, True)


@lowering("nextafter", "prims.nextafter")
def nextafter(self: Any, other: Any) -> Any:
    a, b = promote(self, other)
    fixed = lax.stop_gradient(a)
    return a + (jnp.nextafter(fixed, lax.stop_gradient(b)) - fixed)


@lowering("logaddexp")
def logaddexp(self: Any, other: Any) -> Any:
    return _arithmetic(jnp.logaddexp, self, other)


@lowering("logaddexp2")
def logaddexp2(self: Any, other: Any) -> Any:
    return _arithmetic(jnp.logaddexp2, self, other)


@lowering("heaviside")
def heaviside(self: Any, values: Any) -> Any:
    return _arithmetic(
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
    return _arithmetic(jnp.gcd, self, other)


@lowering("lcm")
def lcm(self: Any, other: Any) -> Any:
    return _arithmetic(jnp.lcm, self, other)


@lowering("ldexp.Tensor")
def ldexp(self: Any, other: Any) -> Any:
    return mul(self, _unary(jnp.exp2, True)(other))


@lowering("xlogy.Tensor", "xlogy.Scalar_Other", "xlogy.Scalar_Self", "special_xlogy")
def xlogy(self: Any, other: Any) -> Any:
    def fn(x: Any, y: Any) -> Any:
        zero = (x == 0) & ~jnp.isnan(y)
        return jnp.where(zero, 0.0, x * jnp.log(jnp.where(zero, 1.0, y)))

    return _arithmetic(fn, self, other, True)


@lowering("special_xlog1py")
def xlog1py(self: Any, other: Any) -> Any:
    def fn(x: Any, y: Any) -> Any:
        zero = (x == 0) & ~jnp.isnan(y)
        return jnp.where(zero, 0.0, x * jnp.log1p(jnp.where(zero, 0.0, y)))

    return _arithmetic(fn, self, other, True)


@lowering("special_zeta", "prims.zeta")
def zeta(self: Any, other: Any) -> Any:
    return _arithmetic(special.zeta, self, other, True)


@lowering("igamma", "prims.igamma")
def igamma(self: Any, other: Any) -> Any:
    return _arithmetic(special.gammainc, self, other, True)


@lowering("igammac", "prims.igammac")
def igammac(self: Any, other: Any) -> Any:
    return _arithmetic(special.gammaincc, self, other, True)


# --- powers: exponents are static, x ** 2 is a product --------------------------------------------


@lowering("pow.Tensor_Scalar")
def pow_scalar(self: Any, exponent: Any) -> Any:
    dtype = result_dtype(self, exponent)
    x = cast(self, wide(dtype))
    if not is_inexact(x) and exponent < 0:
        raise RuntimeError("Integers to negative integer powers are not allowed.")
    if kind(dtype) == 2 and exponent == 0.5:
        return cast(jnp.sqrt(x), dtype)
    if isinstance(exponent, float) and exponent.is_integer() and abs(exponent) < 64:
        exponent = int(exponent)
    if isinstance(exponent, int) and not isinstance(exponent, bool):
        return cast(lax.integer_pow(x, exponent), dtype)
    return cast(jnp.power(x, cast(exponent, x.dtype)), dtype)


@lowering("pow.Tensor_Tensor", "pow.Scalar", "prims.pow", "float_power.Tensor_Tensor")
def pow_(self: Any, exponent: Any) -> Any:
    return _arithmetic(_power, self, exponent)


def _power(x: Any, y: Any) -> Any:
    if not is_inexact(x):
        # A negative exponent gives 0 but for bases of 1 and -1.
        up = jnp.power(x, jnp.maximum(y, 0))
        unit = jnp.where(x == 1, 1, jnp.where(x == -1, 1 - 2 * (y & 1), 0))
        return jnp.where(y < 0, unit.astype(up.dtype), up)
    if kind(x.dtype) == 3:
        return jnp.power(x, y)
    return _real_power(*jnp.broadcast_arrays(x, y))


@jax.custom_jvp
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


# --- comparisons, logic, bits --------------------------------------------------------------------


def _compare(name: str, fn: Fn) -> None:
    @lowering(*_both(name), f"prims.{name}", scalars=True)
    def lowered(self: Any, other: Any) -> Any:
        return fn(*promote(self, other))


for _name, _fn in (
    ("eq", jnp.equal),
    ("ne", jnp.not_equal),
    ("lt", jnp.less),
    ("le", jnp.less_equal),
    ("gt", jnp.greater),
    ("ge", jnp.greater_equal),
):
    _compare(_name, _fn)


def _logical(name: str, fn: Fn) -> None:
    @lowering(name)
    def lowered(self: Any, other: Any) -> Any:
        return fn(self != 0, other != 0)


for _name, _fn in (
    ("logical_and", jnp.logical_and),
    ("logical_or", jnp.logical_or),
    ("logical_xor", jnp.logical_xor),
):
    _logical(_name, _fn)


def _bitwise(name: str, fn: Fn) -> None:
    @lowering(*_both(name), f"{name}.Scalar_Tensor", f"prims.{name}")
    def lowered(self: Any, other: Any) -> Any:
        return _arithmetic(fn, self, other)


for _name, _fn in (
    ("bitwise_and", jnp.bitwise_and),
    ("bitwise_or", jnp.bitwise_or),
    ("bitwise_xor", jnp.bitwise_xor),
):
    _bitwise(_name, _fn)


def _shift_left(a: Any, b: Any) -> Any:
    return lax.shift_left(*jnp.broadcast_arrays(a, b))


def _shift_right(a: Any, b: Any) -> Any:
    return lax.shift_right_arithmetic(*jnp.broadcast_arrays(a, b))


for _name, _fn in (
    ("bitwise_left_shift", _shift_left),
    ("bitwise_right_shift", _shift_right),
):
    lowering(f"{_name}.Tensor", f"{_name}.Tensor_Scalar", f"{_name}.Scalar_Tensor")(
        lambda self, other, fn=_fn: _arithmetic(fn, self, other)
    )
lowering("__lshift__.Tensor", "__lshift__.Scalar", "prims.shift_left")(
    lambda self, other: _arithmetic(_shift_left, self, other)
)
lowering("__rshift__.Tensor", "__rshift__.Scalar", "prims.shift_right_arithmetic")(
    lambda self, other: _arithmetic(_shift_right, self, other)
)


# --- choices and bounds --------------------------------------------------------------------------


@lowering(
    "where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar", "prims.where",
    scalars=True,
)  # fmt: skip
def where(condition: Any, self: Any, other: Any) -> Any:
    return jnp.where(condition != 0, *promote(self, other))


@lowering("masked_fill.Scalar", "masked_fill.Tensor", scalars=True)
def masked_fill(self: Any, mask: Any, value: Any) -> Any:
    return jnp.where(mask, cast(value, self.dtype), self)


def _at_most(x: Any, bound: Any) -> Any:
    """``minimum`` whose derivative belongs to ``x`` where both are equal, and NaN stays NaN."""
    return (
        jnp.where(x > bound, bound, jnp.where(jnp.isnan(bound), bound, x))
        if is_inexact(x)
        else jnp.minimum(x, bound)
    )


def _at_least(x: Any, bound: Any) -> Any:
    return (
        jnp.where(x < bound, bound, jnp.where(jnp.isnan(bound), bound, x))
        if is_inexact(x)
        else jnp.maximum(x, bound)
    )


@lowering("clamp", "clamp.Tensor", scalars=True)
def clamp(self: Any, min: Any = None, max: Any = None) -> Any:
    given = [x for x in (min, max) if x is not None]
    dtype = result_dtype(self, *given)
    x = cast(self, dtype)
    if min is not None:
        x = _at_least(x, cast(min, dtype))
    if max is not None:
        x = _at_most(x, cast(max, dtype))
    return x


@lowering("clamp_min", "clamp_min.Tensor", scalars=True)
def clamp_min(self: Any, min: Any) -> Any:
    return clamp(self, min)


@lowering("clamp_max", "clamp_max.Tensor", scalars=True)
def clamp_max(self: Any, max: Any) -> Any:
    return clamp(self, None, max)


@lowering("lerp.Scalar", "lerp.Tensor", scalars=True)
def lerp(self: Any, end: Any, weight: Any) -> Any:
    compute = wide(result_dtype(self, end))
    a, b = cast(self, compute), cast(end, compute)
    w = cast(weight, compute)
    return cast(jnp.where(abs(w) < 0.5, a + w * (b - a), b - (b - a) * (1 - w)), self.dtype)


@lowering("addcmul", scalars=True)
def addcmul(self: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    dtype = result_dtype(self, tensor1, tensor2)
    a, b, c, v = (cast(x, wide(dtype)) for x in (self, tensor1, tensor2, value))
    return cast(a + v * b * c, dtype)


@lowering("addcdiv", scalars=True)
def addcdiv(self: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    dtype = result_dtype(self, tensor1, tensor2)
    if kind(dtype) < 2:
        raise RuntimeError("Integer division with addcdiv is no longer supported.")
    a, b, c, v = (cast(x, wide(dtype)) for x in (self, tensor1, tensor2, value))
    return cast(a + v * (b / c), dtype)


@lowering("complex")
def complex_(real: Any, imag: Any) -> Any:
    return lax.complex(*jnp.broadcast_arrays(*promote(real, imag)))


@lowering("polar")
def polar(abs: Any, angle: Any) -> Any:
    return lax.complex(abs * jnp.cos(angle), abs * jnp.sin(angle))


# --- activations ---------------------------------------------------------------------------------


def _activation(*names: str) -> Callable[[Fn], Fn]:
    """Register a function of a tensor and numbers, computed in float32 for half precision."""

    def register(fn: Fn) -> Fn:
        def lowered(self: Any, *numbers: Any, **named: Any) -> Any:
            return cast(fn(cast(self, wide(self.dtype)), *numbers, **named), self.dtype)

        lowering(*names)(lowered)
        return lowered

    return register


@_activation("gelu")
def gelu(x: Any, *, approximate: str = "none") -> Any:
    if approximate == "tanh":
        return jax.nn.gelu(x, approximate=True)
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


@_activation("silu")
def silu(x: Any) -> Any:
    return x * lax.logistic(x)


@_activation("mish")
def mish(x: Any) -> Any:
    return x * jnp.tanh(jax.nn.softplus(x))


@_activation("hardtanh")
def hardtanh(x: Any, min_val: Any = -1, max_val: Any = 1) -> Any:
    # Its derivative is 0 at the bounds, as hardtanh_backward has it.
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
    low = jnp.where(x > 0, 0.0, x)
    return jnp.where(x > 0, x * scale, jnp.expm1(low * input_scale) * (alpha * scale))


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
    return cast(jax.nn.log_sigmoid(x), self.dtype), jnp.zeros((0,), self.dtype)


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


# --- and their derivatives, for backward() -------------------------------------------------------


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
    cdf = 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))
    pdf = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return cast(g * (cdf + x * pdf), self.dtype)


@lowering("silu_backward")
def silu_backward(grad_output: Any, self: Any) -> Any:
    compute = wide(self.dtype)
    x, g = cast(self, compute), cast(grad_output, compute)
    s = lax.logistic(x)
    return cast(g * s * (1 + x * (1 - s)), self.dtype)
