"""Optimizers call operators on lists of tensors, which are one program for the whole list.

Each is the operator of its name on the elements. Numbers do not select a program, so another
learning rate needs no other program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import torch

# These imports fill the table that is read here.
from . import (
    binary,  # noqa: F401
    choices,  # noqa: F401
    factories,  # noqa: F401
    reductions,  # noqa: F401
    special,  # noqa: F401
    unary,  # noqa: F401
)
from .promotion import cast, wide
from .registry import TABLE, Lowering, lowering, overload

_UNARY = (
    *("abs", "acos", "asin", "atan", "ceil", "cos", "cosh", "erf", "erfc", "exp", "expm1", "floor"),
    *("frac", "lgamma", "log", "log10", "log1p", "log2", "neg", "reciprocal", "round", "rsqrt"),
    *("sigmoid", "sign", "sin", "sinh", "sqrt", "tan", "tanh", "trunc"),
)
_BINARY = ("add", "sub", "mul", "div", "pow", "maximum", "minimum", "clamp_max", "clamp_min")
_TERNARY = ("addcmul", "addcdiv")


def _register(name: str, fn: Callable[..., Any], scalars: bool = True) -> None:
    op = overload(name)
    if op is not None:
        TABLE[op] = Lowering(fn, scalars=scalars)


def _elementwise(name: str, scalar: str, tensor: str, scalars: bool = True) -> None:
    of_scalar, of_tensor = overload(f"{name}.{scalar}"), overload(f"{name}.{tensor}")
    # The bounds of maximum and minimum may be numbers here, which their own operators do not take.
    by_number = TABLE.get(of_scalar) or TABLE[of_tensor]
    by_tensor = TABLE[of_tensor]

    def numbers(self: Any, scalar: Any) -> Any:
        return [by_number.fn(x, scalar) for x in self]

    def number_list(self: Any, scalars: Any) -> Any:
        return [by_number.fn(x, s) for x, s in zip(self, scalars, strict=True)]

    def lists(self: Any, other: Any, **named: Any) -> Any:
        return [by_tensor.fn(x, y, **named) for x, y in zip(self, other, strict=True)]

    def one(self: Any, other: Any, **named: Any) -> Any:
        return [by_tensor.fn(x, other, **named) for x in self]

    _register(f"_foreach_{name}.Scalar", numbers, scalars)
    _register(f"_foreach_{name}.ScalarList", number_list, scalars)
    _register(f"_foreach_{name}.List", lists)
    _register(f"_foreach_{name}.Tensor", one)


for _name in _UNARY:
    _fn = TABLE[overload(_name)].fn
    _register(f"_foreach_{_name}", lambda self, fn=_fn: [fn(x) for x in self])
for _name in _BINARY:
    if _name == "pow":
        # A known exponent makes the power a product, or a root.
        _elementwise(_name, "Tensor_Scalar", "Tensor_Tensor", scalars=False)
    elif _name in ("maximum", "minimum"):
        _elementwise(_name, "default", "default")
    elif _name.startswith("clamp"):
        _elementwise(_name, "default", "Tensor")
    else:
        _elementwise(_name, "Scalar", "Tensor")


def _ternary(name: str) -> None:
    fn = TABLE[overload(name)].fn

    def scalar(self: Any, tensor1: Any, tensor2: Any, value: Any = 1) -> Any:
        return [fn(x, a, b, value=value) for x, a, b in zip(self, tensor1, tensor2, strict=True)]

    def scalars(self: Any, tensor1: Any, tensor2: Any, scalars: Any) -> Any:
        rows = zip(self, tensor1, tensor2, list(scalars), strict=True)
        return [fn(x, a, b, value=v) for x, a, b, v in rows]

    _register(f"_foreach_{name}.Scalar", scalar)
    _register(f"_foreach_{name}.ScalarList", scalars)
    _register(f"_foreach_{name}.Tensor", scalars)


for _name in _TERNARY:
    _ternary(_name)

_lerp = TABLE[torch.ops.aten.lerp.Scalar].fn
_register(
    "_foreach_lerp.Scalar",
    lambda self, tensors1, weight: [
        _lerp(x, y, weight) for x, y in zip(self, tensors1, strict=True)
    ],
)
_register(
    "_foreach_lerp.List",
    lambda self, tensors1, weights: [
        _lerp(x, y, w) for x, y, w in zip(self, tensors1, weights, strict=True)
    ],
)
_norm = TABLE[torch.ops.aten.linalg_vector_norm.default].fn
_register(
    "_foreach_norm.Scalar",
    lambda self, ord=2, dtype=None: [_norm(x, ord, dtype=dtype) for x in self],
)
TABLE[torch.ops.aten._foreach_norm.Scalar] = Lowering(TABLE[torch.ops.aten._foreach_norm.Scalar].fn)
_copy = TABLE[torch.ops.aten.copy.default].fn
_register(
    "_foreach_copy",
    lambda self, src, non_blocking=False: [_copy(x, y) for x, y in zip(self, src, strict=True)],
)
_register("_foreach_zero", lambda self: [_zeros(x) for x in self])


def _zeros(x: Any) -> Any:
    return TABLE[torch.ops.aten.zero.default].fn(x)


# --- torch.amp.GradScaler calls these ------------------------------------------------------------


@lowering("_amp_foreach_non_finite_check_and_unscale")
def _unscale(self: Any, found_inf: Any, inv_scale: Any) -> Any:
    """Return the tensors times ``inv_scale``, and 1 where one has an infinity or NaN."""
    finite = jnp.array(True)
    for x in self:
        finite &= jnp.isfinite(x).all()
    scaled = [cast(cast(x, wide(x.dtype)) * inv_scale, x.dtype) for x in self]
    return scaled, jnp.where(finite, found_inf, jnp.ones_like(found_inf))


@lowering("_amp_update_scale")
def _update_scale(
    self: Any,
    growth_tracker: Any,
    found_inf: Any,
    scale_growth_factor: float,
    scale_backoff_factor: float,
    growth_interval: int,
) -> Any:
    """Return a smaller scale after an infinity, a larger one after so many steps without any."""
    bad = found_inf > 0
    steps = growth_tracker + 1
    grown = self * scale_growth_factor
    full = steps == growth_interval
    scale = jnp.where(full & jnp.isfinite(grown), grown, self)
    scale = jnp.where(bad, self * scale_backoff_factor, scale)
    return cast(scale, self.dtype), jnp.where(bad | full, jnp.zeros_like(steps), steps)
