"""These operators compare values, or compute on truth values and bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from .binary import arithmetic, both
from .promotion import promote
from .registry import lowering

Fn = Callable[..., Any]


def _compare(name: str, fn: Fn) -> None:
    @lowering(*both(name), f"prims.{name}", scalars=True)
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
    @lowering(*both(name), f"{name}.Scalar_Tensor", f"prims.{name}")
    def lowered(self: Any, other: Any) -> Any:
        return arithmetic(fn, self, other)


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
        lambda self, other, fn=_fn: arithmetic(fn, self, other)
    )
lowering("__lshift__.Tensor", "__lshift__.Scalar", "prims.shift_left")(
    lambda self, other: arithmetic(_shift_left, self, other)
)
lowering("__rshift__.Tensor", "__rshift__.Scalar", "prims.shift_right_arithmetic")(
    lambda self, other: arithmetic(_shift_right, self, other)
)
