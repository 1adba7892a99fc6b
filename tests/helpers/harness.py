"""Runs a case and its twin through one JAX transform and compares what comes out."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import recorded
import torch
from cases import CASES, Case
from compiling import quick_jit
from jax.dtypes import float0

from torch2jax import torch2jax

Function = Callable[..., Any]

# the whole table, for the basic transforms
DIFFERENTIABLE = [case for case in CASES if case.differentiable]
FORWARD = [case for case in DIFFERENTIABLE if case.forward]
TWICE = [case for case in FORWARD if case.order >= 2]
THRICE = [case for case in FORWARD if case.order >= 3]
LINEAR = [case for case in CASES if case.linear]
MAPPED = [case for case in CASES if case.specs]

# the cases that go through everything
CORE = [case for case in DIFFERENTIABLE if case.core]
CORE_FORWARD = [case for case in FORWARD if case.core]
CORE_TWICE = [case for case in TWICE if case.core]
CORE_THRICE = [case for case in THRICE if case.core]

# relative and absolute tolerance by dtype; a case's rtol multiplies both
TOLERANCE = {
    "float16": 5e-3,
    "bfloat16": 4e-2,
    "float32": 3e-5,
    "complex64": 3e-5,
    "float64": 1e-9,
    "complex128": 1e-9,
}


def own_precision(case: Case) -> bool:
    """Whether a case has x64 on where a test runs it once: every second case of the table has."""
    return bool(CASES.index(case) % 2)


@contextlib.contextmanager
def precision(x64: bool) -> Iterator[None]:
    """64-bit types on or off, for this block alone."""
    context = (
        jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    )  # jax < 0.8
    with context(x64):
        yield


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """PyTorch's default dtype, for this block alone."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


COMPILED = os.environ.get("T2J_COMPILED", "")
"""With "recorded" the whole of tests/transforms runs on the graphs of compiled=True, in PyTorch; with
"libraries" PyTorch compiles each (hours)."""

if COMPILED == "recorded":
    recorded.install()


@functools.cache
def bridge(case: Case) -> Function:
    """The case's torch function, as users wrap it."""
    return torch2jax(case.torch_fn, compiled=bool(COMPILED))


def check(actual: Any, expected: Any, scale: float = 1.0, floor: float = 0.0) -> None:
    """The two trees have one structure, and each leaf the same dtype, shape and, nearly, values.

    floor: the least tolerance of a number, whatever its dtype.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(expected)
    ]
    for path, got, want in zip(
        paths, jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        assert got.dtype == want.dtype, f"result{path}: dtype {got.dtype}, expected {want.dtype}"
        assert got.shape == want.shape, f"result{path}: shape {got.shape}, expected {want.shape}"
        if want.dtype == float0:
            continue
        tolerance = scale * TOLERANCE.get(want.dtype.name, 0.0)
        tolerance = max(tolerance, floor) if tolerance else 0.0
        wide = np.complex128 if jnp.iscomplexobj(want) else np.float64
        np.testing.assert_allclose(
            np.asarray(got).astype(wide),
            np.asarray(want).astype(wide),
            rtol=tolerance,
            atol=tolerance,
            err_msg=f"result{path}",
        )


def close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Two tensors, arrays or numbers of one shape agree; two tensors are of one dtype, too."""
    if isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype
    actual, expected = as_array(actual), as_array(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, tolerance, tolerance)


def as_array(x: Any) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().resolve_conj().resolve_neg()
        x = x.float() if x.dtype == torch.bfloat16 else x
    return np.asarray(x)


def coarseness(case: Case) -> float:
    """What a number computed from half precision is worth: XLA may skip roundings in between."""
    halves = ("float16", "bfloat16")
    return max([TOLERANCE[spec.dtype] for spec in case.specs if spec.dtype in halves], default=0.0)


def weights(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Fixed random numbers of this shape and dtype, for cotangents, tangents and weighted sums."""
    rng = np.random.default_rng(zlib.crc32(str(shape).encode()))
    values = rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = values + 1j * rng.uniform(0.5, 1.5, shape)
    return values.astype(dtype)


def like(tree: Any) -> Any:
    """Tangents or cotangents of a tree: random where its dtypes are inexact, float0 elsewhere."""

    def one(leaf: Any) -> np.ndarray:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return weights(leaf.shape, leaf.dtype)
        return np.zeros(leaf.shape, float0)

    return jax.tree.map(one, tree)


def inexact(tree: Any) -> list[Any]:
    """The leaves of a tree that can have derivatives."""
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def weigh(tree: Any) -> jax.Array:
    """A real number in which every inexact leaf of a tree counts, with fixed random weights."""
    total = jnp.zeros((), float)
    for leaf in inexact(tree):
        wide = jnp.promote_types(leaf.dtype, total.dtype)
        total = total + jnp.real(weights(leaf.shape, wide) * leaf.astype(wide)).sum()
    return total


def weighed(fn: Function) -> Function:
    """fn, followed by `weigh`: what jax.grad can take."""
    return lambda *xs: weigh(fn(*xs))


def floats(fn: Function) -> Function:
    """fn with its integer outputs left out."""
    return lambda *xs: inexact(fn(*xs))


def every(xs: tuple[Any, ...]) -> tuple[int, ...]:
    """argnums of all arguments."""
    return tuple(range(len(xs)))


def on_leaves(fn: Function, case: Case) -> Function:
    """fn as a function of all leaves of its arguments and keyword arguments."""
    structure = jax.tree.structure(case.draw(False))

    def flat(*leaves: Any) -> Any:
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return fn(*args, **kwargs)

    return flat


def on_differentiable(
    fn: Function, case: Case, leaves: list[np.ndarray]
) -> tuple[Function, list[np.ndarray]]:
    """fn as a function of its differentiable leaves, the others closed over; and those leaves."""
    chosen = [i for i, spec in enumerate(case.specs) if spec.diff]
    flat = on_leaves(fn, case)

    def of_chosen(*xs: Any) -> Any:
        full: list[Any] = [jnp.asarray(leaf) for leaf in leaves]
        for i, x in zip(chosen, xs, strict=True):
            full[i] = x
        return flat(*full)

    return of_chosen, [leaves[i] for i in chosen]


def as_real(fn: Function, xs: list[np.ndarray]) -> tuple[Function, list[np.ndarray]]:
    """fn with complex arguments and results split into parts: then it has Jacobians."""
    parts: list[np.ndarray] = []
    for x in xs:
        parts += [x.real.copy(), x.imag.copy()] if np.iscomplexobj(x) else [x]

    def real(*reals: Any) -> list[Any]:
        left = list(reals)
        joined = [
            jax.lax.complex(left.pop(0), left.pop(0)) if np.iscomplexobj(x) else left.pop(0)
            for x in xs
        ]
        outs = inexact(fn(*joined))
        return [
            part
            for out in outs
            for part in ((out.real, out.imag) if jnp.iscomplexobj(out) else (out,))
        ]

    return real, parts


def stack(draws: list[list[np.ndarray]], axes: tuple[int | None, ...]) -> list[np.ndarray]:
    """Batches of the drawn leaves along the given axes; where the axis is None, the first draw."""
    columns = zip(*draws, strict=True)
    return [
        column[0] if axis is None else np.stack(column, axis)
        for column, axis in zip(columns, axes, strict=True)
    ]


def draws(case: Case, n: int, x64: bool, first: int = 0) -> list[list[np.ndarray]]:
    """n independent sets of leaves."""
    return [jax.tree.leaves(case.draw(x64, seed)) for seed in range(first, first + n)]


def agree(
    case: Case,
    transform: Callable[..., Any],
    *xs: Any,
    on: Callable[[Function], Function],
    x64: bool,
    scale: float = 1.0,
    jit: bool = True,
) -> None:
    """transform(on(fn), *xs) is the same for the bridged function and for its twin."""
    with precision(x64):
        xs = tuple(jnp.asarray(x) for x in xs)
        twin = functools.partial(transform, on(case.twin))
        expected = quick_jit(twin)(*xs)
        run = jax.jit if jit else (lambda fn: fn)
        with looping_allowed(case):
            actual = run(functools.partial(transform, on(bridge(case))))(*xs)
            jax.block_until_ready(actual)
        check(actual, expected, scale * case.rtol, coarseness(case))


def agree_on_leaves(
    case: Case, transform: Callable[..., Any], *, x64: bool | None = None, **options: Any
) -> None:
    """`agree` for a transform of a function of all leaves."""
    x64 = own_precision(case) if x64 is None else x64
    (leaves,) = draws(case, 1, x64)
    agree(case, transform, *leaves, on=lambda fn: on_leaves(fn, case), x64=x64, **options)


def agree_on_differentiable(
    case: Case,
    transform: Callable[..., Any],
    *,
    x64: bool | None = None,
    real: bool = False,
    **options: Any,
) -> None:
    """`agree` for a transform of a function of the differentiable leaves; real: complex ones as
    pairs of real ones.

    The case decides the precision where x64 is None: half of the table runs with each.
    """
    x64 = own_precision(case) if x64 is None else x64
    (leaves,) = draws(case, 1, x64)

    def split(fn: Function) -> tuple[Function, list[np.ndarray]]:
        chosen = on_differentiable(fn, case, leaves)
        return as_real(*chosen) if real else chosen

    agree(case, transform, *split(case.twin)[1], on=lambda fn: split(fn)[0], x64=x64, **options)


def agree_on_batch(
    case: Case,
    transform: Callable[..., Any],
    *,
    x64: bool,
    n: int = 3,
    axes: tuple[int | None, ...] | None = None,
    **options: Any,
) -> None:
    """`agree` for a transform of a function of all leaves, called with a batch of each leaf."""
    axes = axes or (0,) * len(case.specs)
    batch = stack(draws(case, n, x64), axes)
    agree(case, transform, *batch, on=lambda fn: on_leaves(fn, case), x64=x64, **options)


@contextlib.contextmanager
def looping_allowed(case: Case) -> Iterator[None]:
    """Where torch cannot batch a case the bridge loops and warns; elsewhere that is an error."""
    if case.vectorizable:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
