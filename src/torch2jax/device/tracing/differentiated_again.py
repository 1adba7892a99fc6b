"""A second derivative of a function whose derivative the user has written."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ..._errors import DifferentiationError

__all__ = ["differentiated_again"]


def differentiated_again(name: str, function: Any, backwards: Any) -> Any:
    """Return the function with a derivative in both modes, made of the backward pass alone.

    A second derivative differentiates the result of the forward pass again. That derivative is
    the user's, too, and the forward pass runs without gradients, so JAX has none of it. The
    backward pass is linear in its cotangents, so its transpose pushes tangents forward.
    """
    again = jax.custom_jvp(function)

    @again.defjvp
    def push(operands: Any, tangents: Any) -> Any:
        out = again(*operands)
        moving = [i for i, t in enumerate(tangents) if t.dtype != jax.dtypes.float0]
        floats = [jax.numpy.issubdtype(x.dtype, jax.numpy.inexact) for x in out]

        def pull(chosen: Any) -> list[Any]:
            left = iter(chosen)
            found = backwards(operands, [next(left) if f else None for f in floats])
            zeros = jax.numpy.zeros_like
            return [zeros(tangents[i]) if found[i] is None else found[i] for i in moving]

        like = [
            jax.ShapeDtypeStruct(x.shape, x.dtype)
            for x, is_float in zip(out, floats, strict=True)
            if is_float
        ]
        try:
            (pushed,) = jax.linear_transpose(pull, like)([tangents[i] for i in moving])
        except (NotImplementedError, AssertionError, TypeError, ValueError) as error:
            raise DifferentiationError(
                f"{name} has no second derivative: its backward pass is not linear in its "
                "cotangents, or it computes without gradients."
            ) from error
        left = iter(pushed)
        float0 = jax.dtypes.float0
        return out, [
            next(left) if is_float else np.zeros(x.shape, float0)
            for x, is_float in zip(out, floats, strict=True)
        ]

    return again
