"""linear_transpose: of linear functions, of linearized ones, and of batches of either."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from harness import CORE_FORWARD, LINEAR, Function, agree_on_differentiable, floats, like


def shapes(xs: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), xs)


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_function(case: Case) -> None:
    def transform(f: Function, *xs: Any) -> Any:
        transposed = jax.linear_transpose(floats(f), *shapes(xs))
        return transposed(like(floats(f)(*xs)))

    agree_on_differentiable(case, transform)


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_twice(case: Case) -> None:
    """The transpose of the transpose is the function."""

    def transform(f: Function, *xs: Any) -> Any:
        outs = shapes(floats(f)(*xs))
        transposed = jax.linear_transpose(floats(f), *shapes(xs))
        return jax.linear_transpose(transposed, outs)(tuple(xs))

    agree_on_differentiable(case, transform, x64=True)


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_vmap_of_transpose(case: Case) -> None:
    def transform(f: Function, *xs: Any) -> Any:
        transposed = jax.linear_transpose(floats(f), *shapes(xs))
        return jax.vmap(transposed)([np.stack([y, 2 * y]) for y in like(floats(f)(*xs))])

    agree_on_differentiable(case, transform, x64=True)


@pytest.mark.parametrize("case", CORE_FORWARD, ids=str)
def test_linearized(case: Case) -> None:
    def transform(f: Function, *xs: Any) -> Any:
        outs, push = jax.linearize(floats(f), *xs)
        return jax.linear_transpose(push, *xs)(like(outs))

    agree_on_differentiable(case, transform)


@pytest.mark.parametrize("case", CORE_FORWARD, ids=str)
def test_vmap_of_linearized(case: Case) -> None:
    def transform(f: Function, *xs: Any) -> Any:
        _, push = jax.linearize(floats(f), *xs)
        batch = [jnp.stack([x, x * 0, -x]) for x in xs]
        outs = jax.eval_shape(jax.vmap(push), *batch)
        return jax.linear_transpose(jax.vmap(push), *batch)(like(outs))

    agree_on_differentiable(case, transform)


@pytest.mark.parametrize("case", CORE_FORWARD, ids=str)
def test_derivative_of_transposed(case: Case) -> None:
    """A transpose is linear: its JVP is itself, applied to the tangent."""

    def transform(f: Function, *xs: Any) -> Any:
        outs, push = jax.linearize(floats(f), *xs)
        transposed = jax.linear_transpose(push, *xs)
        return jax.jvp(transposed, (like(outs),), ([2 * y for y in like(outs)],))

    agree_on_differentiable(case, transform)
