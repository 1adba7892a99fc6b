"""These are special functions of one value and of two."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.scipy import special

from .binary import arithmetic
from .derivative_rules import own_derivative
from .promotion import cast, floating, wide
from .registry import lowering
from .unary import unary

Fn = Callable[..., Any]


def _sinc(x: Any) -> Any:
    y = jnp.pi * x
    safe = jnp.where(x == 0, 1.0, y)
    return jnp.where(x == 0, 1.0, jnp.sin(safe) / safe)


def _digamma(x: Any) -> Any:
    # Below 0 psi(x) = psi(1 - x) - pi / tan(pi x), where tan takes the distance to the pole.
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
    # For large x exp(x^2) erfc(x) would be inf * 0, so its asymptotic series is taken.
    big = x > 5
    small = jnp.where(big, 0.0, x)
    z = 1 / jnp.where(big, x * x, 1.0)
    series = 1 - z / 2 * (1 - 3 * z / 2 * (1 - 5 * z / 2 * (1 - 7 * z / 2)))
    tail = series / (jnp.where(big, x, 1.0) * math.sqrt(math.pi))
    return jnp.where(big, tail, jnp.exp(small * small) * lax.erfc(small))


@own_derivative
def _i0(x: Any) -> Any:
    return special.i0(x)


@_i0.defjvp
def _i0_jvp(primals: Any, tangents: Any) -> Any:
    # JAX's own derivative at 0 is 1, where I0' = I1 is 0.
    return _i0(*primals), _i1(*primals) * tangents[0]


@own_derivative
def _i1(x: Any) -> Any:
    return special.i1(x)


@_i1.defjvp
def _i1_jvp(primals: Any, tangents: Any) -> Any:
    # I1' = I0 - I1 / x, which is 1/2 at 0.
    (x,), (dx,) = primals, tangents
    zero, out = x == 0, _i1(x)
    return out, jnp.where(zero, 0.5, _i0(x) - out / jnp.where(zero, 1, x)) * dx


_TABLE: dict[str, Fn] = {
    "digamma": _digamma,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "erfinv": lax.erf_inv,
    "i0": _i0,
    "lgamma": lax.lgamma,
    "sinc": _sinc,
    "special_entr": special.entr,
    "special_erfcx": _erfcx,
    "special_i0e": special.i0e,
    "special_i1": _i1,
    "special_i1e": special.i1e,
    "special_log_ndtr": special.log_ndtr,
    "special_ndtri": special.ndtri,
}
for _name, _fn in _TABLE.items():
    lowering(_name, f"prims.{_name}")(unary(_fn, True))
for _name, _fn in {
    "prims.erf_inv": lax.erf_inv,
    "prims.bessel_i0": _i0,
    "prims.bessel_i0e": special.i0e,
    "prims.bessel_i1": _i1,
    "prims.bessel_i1e": special.i1e,
    "prims.ndtri": special.ndtri,
    "prims.erfcx": _erfcx,
}.items():
    lowering(_name)(unary(_fn, True))


@lowering("logit")
def logit(self: Any, eps: float | None = None) -> Any:
    dtype = floating(self.dtype)
    x = cast(self, wide(dtype))
    if eps is not None:
        x = jnp.clip(x, eps, 1 - eps)
    return cast(jnp.log(x / (1 - x)), dtype)


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


@lowering("xlogy.Tensor", "xlogy.Scalar_Other", "xlogy.Scalar_Self", "special_xlogy")
def xlogy(self: Any, other: Any) -> Any:
    def fn(x: Any, y: Any) -> Any:
        zero = (x == 0) & ((y <= 0) | jnp.isinf(y))
        return jnp.where(zero, 0.0, x * jnp.log(jnp.where(zero, 1.0, y)))

    return arithmetic(fn, self, other, True)


@lowering("special_xlog1py")
def xlog1py(self: Any, other: Any) -> Any:
    def fn(x: Any, y: Any) -> Any:
        zero = (x == 0) & ((y <= -1) | jnp.isinf(y))
        return jnp.where(zero, 0.0, x * jnp.log1p(jnp.where(zero, 0.0, y)))

    return arithmetic(fn, self, other, True)


@lowering("special_zeta", "prims.zeta")
def zeta(self: Any, other: Any) -> Any:
    return arithmetic(_zeta, self, other, True)


def _zeta(x: Any, q: Any) -> Any:
    # As in Cephes there are poles at x = 1 and at q = 0, -1, ... Other q < 0 with a fractional x
    # would take powers of negative numbers, so the result is NaN.
    below = q <= 0
    y = jnp.where(below & (x != jnp.floor(x)), jnp.nan, special.zeta(x, q))
    y = jnp.where(below & (q == jnp.floor(q)), jnp.inf, y)
    return jnp.where(x < 1, jnp.nan, jnp.where(x == 1, jnp.inf, y))


@lowering("igamma", "prims.igamma")
def igamma(self: Any, other: Any) -> Any:
    return arithmetic(special.gammainc, self, other, True)


@lowering("igammac", "prims.igammac")
def igammac(self: Any, other: Any) -> Any:
    return arithmetic(special.gammaincc, self, other, True)
