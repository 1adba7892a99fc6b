"""These functions of one value are in every library of mathematics.

Half precision is computed in float32, as PyTorch's kernels do. Integers become floating where
PyTorch's result is floating.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from .derivative_rules import own_derivative
from .promotion import array_dtype, cast, category, floating, is_float, is_inexact, wide
from .registry import lowering

Fn = Callable[..., Any]


def unary(fn: Fn, to_float: bool) -> Fn:
    def lowered(self: Any) -> Any:
        dtype = floating(self.dtype) if to_float else self.dtype
        return cast(fn(cast(self, wide(dtype))), dtype)

    return lowered


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
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "log": jnp.log,
    "log10": jnp.log10,
    "log1p": jnp.log1p,
    "log2": jnp.log2,
    "rad2deg": lambda x: x * (180 / math.pi),
    "reciprocal": lambda x: 1 / x,
    "rsqrt": lax.rsqrt,
    "sigmoid": lax.logistic,
    "sin": jnp.sin,
    "sinh": jnp.sinh,
    "sqrt": jnp.sqrt,
    "tan": lax.tan,
    "tanh": jnp.tanh,
}


def _same_for_integers(fn: Fn) -> Fn:
    return lambda x: fn(x) if is_inexact(x) else x


_SAME: dict[str, Fn] = {
    "bitwise_not": jnp.bitwise_not,
    "ceil": _same_for_integers(jnp.ceil),
    "conj_physical": jnp.conj,
    "floor": _same_for_integers(jnp.floor),
    "frac": lambda x: x - jnp.trunc(x),
    "neg": jnp.negative,
    "positive": lambda x: x,
    "round": _same_for_integers(jnp.round),
    "sgn": lambda x: _sgn(x),
    "sign": jnp.sign,
    "square": jnp.square,
    "trunc": _same_for_integers(jnp.trunc),
}

for _name, _fn in _FLOATING.items():
    lowering(_name, f"prims.{_name}")(unary(_fn, True))
for _name, _fn in _SAME.items():
    lowering(_name, f"prims.{_name}")(unary(_fn, False))
lowering("prims.cbrt")(unary(jnp.cbrt, True))


@lowering("abs", "prims.abs")
def abs_(self: Any) -> Any:
    if category(self.dtype) == 3:
        return _complex_abs(self)
    return self if category(self.dtype) == 0 else _abs(self)


@own_derivative
def _abs(x: Any) -> Any:
    return lax.abs(x)


@_abs.defjvp
def _abs_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    return _abs(x), dx * jnp.sign(x).astype(dx.dtype)


def _sgn(x: Any) -> Any:
    if category(x.dtype) < 3:
        return jnp.sign(x)
    zero = x == 0  # the derivative there is 0
    safe = jnp.where(zero, 1, x)
    return jnp.where(zero, 0, safe / jnp.abs(safe))


def _complex_abs(x: Any) -> Any:
    # The derivative at 0 is 0 and not NaN, as in PyTorch.
    zero = x == 0
    return jnp.where(zero, 0, jnp.abs(jnp.where(zero, 1, x)))


@lowering("angle")
def angle(self: Any) -> Any:
    if category(self.dtype) == 3:
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


@lowering("nan_to_num")
def nan_to_num(
    self: Any, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Any:
    if not is_inexact(self):
        return self
    if category(self.dtype) == 3:
        return lax.complex(
            nan_to_num(self.real, nan, posinf, neginf), nan_to_num(self.imag, nan, posinf, neginf)
        )
    return jnp.nan_to_num(self, nan=0.0 if nan is None else nan, posinf=posinf, neginf=neginf)


@lowering("frexp.Tensor", int32=True)
def frexp(self: Any) -> Any:
    return _mantissa(self), jnp.frexp(self)[1].astype(np.int32)


@own_derivative
def _mantissa(x: Any) -> Any:
    return jnp.frexp(x)[0]


@_mantissa.defjvp
def _mantissa_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    return _mantissa(x), dx / jnp.exp2(jnp.frexp(x)[1].astype(dx.dtype))


@lowering("prims.convert_element_type")
def convert_element_type(a: Any, dtype: torch.dtype) -> Any:
    return cast(a, array_dtype(dtype))


@lowering("clone", "prims.clone", "lift_fresh_copy", "alias_copy", "detach_copy", "resolve_conj")
def clone(self: Any, *, memory_format: Any = None) -> Any:
    return self


@lowering("copy")
def copy(self: Any, src: Any, non_blocking: bool = False) -> Any:
    return jnp.broadcast_to(cast(src, self.dtype), self.shape)
