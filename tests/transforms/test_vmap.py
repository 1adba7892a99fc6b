"""vmap alone: where the batch axis is, where it goes, vmap in vmap."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from cases import Case
from harness import (
    MAPPED,
    Function,
    agree,
    agree_on_batch,
    bridge,
    draws,
    looping_allowed,
    on_leaves,
    precision,
    stack,
)

MAPPED_CORE = [case for case in MAPPED if case.core or not case.differentiable]
SEVERAL = [case for case in MAPPED_CORE if len(case.specs) > 1]


def axes_of(pattern: str, case: Case) -> tuple[int | None, ...]:
    """One axis for each leaf, repeating a pattern of 0 (first), L (last) and - (not mapped)."""
    return tuple(
        {"0": 0, "L": -1, "-": None}[pattern[i % len(pattern)]] for i in range(len(case.specs))
    )


@pytest.mark.parametrize("case", MAPPED, ids=str)
def test_first_axis(case: Case, x64: bool) -> None:
    agree_on_batch(case, lambda f, *xs: jax.vmap(f)(*xs), x64=x64)


@pytest.mark.parametrize("case", MAPPED_CORE, ids=str)
def test_eager_last_axis(case: Case) -> None:
    axes = axes_of("L", case)
    agree_on_batch(case, lambda f, *xs: jax.vmap(f, axes, -1)(*xs), axes=axes, x64=False, jit=False)


@pytest.mark.parametrize("pattern", ["-0L", "0L-", "L-0"])
@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_mixed_axes(case: Case, pattern: str) -> None:
    axes = axes_of(pattern, case)
    if set(axes) == {None}:
        axes = (0, *axes[1:])
    agree_on_batch(case, lambda f, *xs: jax.vmap(f, axes, -1)(*xs), axes=axes, x64=True)


@pytest.mark.parametrize("case", MAPPED_CORE, ids=str)
def test_nested(case: Case) -> None:
    """The outer map over half of the leaves only, the inner over all, along different axes."""
    outer, inner = axes_of("0-", case), axes_of("0L", case)
    rows = [stack(draws(case, 2, True, first), inner) for first in (0, 2, 4)]
    batch = stack(rows, outer)

    def transform(f: Function, *xs: Any) -> Any:
        return jax.vmap(jax.vmap(f, inner), outer, -1)(*xs)

    agree(case, transform, *batch, on=lambda fn: on_leaves(fn, case), x64=True)


@pytest.mark.parametrize("case", MAPPED[::8], ids=str)
def test_batch_of_one(case: Case) -> None:
    agree_on_batch(case, lambda f, *xs: jax.vmap(f)(*xs), n=1, x64=False)


@pytest.mark.parametrize("case", [case for case in MAPPED if case.vectorizable][::8], ids=str)
def test_empty_batch(case: Case) -> None:
    with precision(False):
        batch = [leaf[:0] for leaf in stack(draws(case, 1, False), (0,) * len(case.specs))]
        with looping_allowed(case):
            actual = jax.vmap(on_leaves(bridge(case), case))(*batch)
        expected = jax.vmap(on_leaves(case.twin, case))(*batch)
    shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]  # noqa: E731
    assert shapes(actual) == shapes(expected)


@pytest.mark.parametrize("case", MAPPED[1::8], ids=str)
def test_axis_name(case: Case) -> None:
    """A named axis can be used around the call."""

    def transform(f: Function, *xs: Any) -> Any:
        return jax.vmap(lambda *xs: jax.lax.psum(f(*xs), "rows"), axis_name="rows")(*xs)

    agree_on_batch(case, transform, x64=True)
