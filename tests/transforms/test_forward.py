"""Calls without derivatives: eager, jitted, lowered ahead of time, on shapes only."""

from __future__ import annotations

import jax
import pytest
from cases import CASES, Case
from compiling import quick_jit
from harness import (
    agree_on_leaves,
    bridge,
    check,
    draws,
    looping_allowed,
    on_leaves,
    own_precision,
    precision,
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager(case: Case) -> None:
    agree_on_leaves(case, lambda f, *xs: f(*xs), jit=False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_jit(case: Case, x64: bool) -> None:
    agree_on_leaves(case, lambda f, *xs: f(*xs), x64=x64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eval_shape(case: Case) -> None:
    """Shapes and dtypes are known without a call."""
    x64 = own_precision(case)
    with precision(x64), looping_allowed(case):
        args, kwargs = case.draw(x64)
        shapes = jax.eval_shape(bridge(case), *args, **kwargs)
        expected = jax.eval_shape(case.twin, *args, **kwargs)
    assert jax.tree.structure(shapes) == jax.tree.structure(expected)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(expected)
    ]


@pytest.mark.parametrize("case", CASES[::8], ids=str)
def test_compiled_ahead_of_time(case: Case, x64: bool) -> None:
    """One executable, called with two sets of values."""
    with precision(x64), looping_allowed(case):
        first, second = draws(case, 2, x64)
        compiled = jax.jit(on_leaves(bridge(case), case)).lower(*first).compile()
        for leaves in (first, second):
            check(compiled(*leaves), quick_jit(on_leaves(case.twin, case))(*leaves), case.rtol)


@pytest.mark.parametrize("case", CASES[1::8], ids=str)
def test_calls_inside_one_program(case: Case, x64: bool) -> None:
    """The same function called twice in one jitted function, on different values."""
    first, second = draws(case, 2, x64)
    with precision(x64), looping_allowed(case):
        both = jax.jit(
            lambda a, b: (on_leaves(bridge(case), case)(*a), on_leaves(bridge(case), case)(*b))
        )
        twin = quick_jit(on_leaves(case.twin, case))
        expected = (twin(*first), twin(*second))
        check(both(first, second), expected, case.rtol)
