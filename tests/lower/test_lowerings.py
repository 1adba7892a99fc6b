"""PyTorch's operator samples (`op_db`) as JAX programs: on device "jax", and with `lower=True`.

One sample of each operator, variant and dtype, in bfloat16 of those that have a lowering of their
own: a compiled program each. With T2J_ALL_OP_SAMPLES=1, as `make test-ops` sets it, all samples.
Values and gradients are PyTorch's own on CPU: in eager mode by `backward`, under `jit` by JAX's
derivatives. Once more with x64 off: what is int64 in a sample is carried as int32.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from harness import precision
from lowering_exceptions import (
    EXCEPTIONS,
    NARROW,
    RANDOM,
    REPEATED_WHEN_EXPANDED,
    UNDEFINED_GRADIENTS,
)
from narrow_samples import LAYOUTS, TAKES_INDICES, narrow_samples
from op_exceptions import UNDEFINED_VALUES
from op_samples import (
    ALL_SAMPLES,
    DTYPES,
    Derived,
    Sample,
    compare,
    entries,
    is_inexact,
    op_db,
    samples,
    to_numpy,
)

from torch2jax import device, lowerings, t2j, torch2jax  # noqa: F401  lowerings fill the table
from torch2jax.lowerings.registry import TABLE, DataDependentShape


def eager(op: Any, sample: Sample, derived: Derived | None, loose: bool) -> None:
    """Values and gradients on the device, through PyTorch's own autograd."""
    device.enable()
    moved = [x.to("jax") for x in sample.operands]
    with torch.no_grad():
        values = sample.function(*[x.clone() for x in moved])
    compare("values", list(map(as_array, values)), sample.expected, values=not loose)
    if derived is None or loose:
        return
    cotangents, gradients = derived
    inputs = [x.clone() for x in moved]
    for i in sample.differentiable:
        inputs[i].requires_grad_()
    outs = [x for x in sample.smooth(*inputs) if is_inexact(x)]
    pairs = [
        (x, device.tensor(jnp.conj(ct)).to(x.dtype))
        for x, ct in zip(outs, cotangents, strict=True)
        if x.requires_grad
    ]
    wanted = [inputs[i] for i in sample.differentiable]
    found: Any = [None] * len(wanted)
    if pairs:
        found = torch.autograd.grad(
            [x for x, _ in pairs], wanted, [ct for _, ct in pairs], allow_unused=True
        )
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]
    if op.name not in UNDEFINED_GRADIENTS:
        compare("gradients", [as_array(g.conj()) for g in found], gradients)


def lowered(op: Any, sample: Sample, derived: Derived | None, loose: bool) -> None:
    """One jitted program with the call and its pullback."""
    arrays = [t2j(x) for x in sample.operands]
    derived = None if loose else derived
    cotangents, gradients = derived or ([], [])
    function = torch2jax(sample.function, lower=True, stochastic=True)
    smooth_function = torch2jax(sample.smooth, lower=True, stochastic=True)
    key = jax.random.key(0)

    def program(arrays: list[jax.Array], cotangents: Any) -> Any:
        values = function(*arrays, rng=key)
        if not derived:
            return values, []

        def smooth(*chosen: jax.Array) -> list[jax.Array]:
            full = list(arrays)
            for i, x in zip(sample.differentiable, chosen, strict=True):
                full[i] = x
            outs = smooth_function(*full, rng=key)
            return [out for out in outs if jnp.issubdtype(out.dtype, jnp.inexact)]

        _, pull = jax.vjp(smooth, *[arrays[i] for i in sample.differentiable])
        return values, pull(cotangents)

    try:
        values, found = jax.jit(program)(arrays, cotangents)
    except DataDependentShape:
        assert sample.shapes_depend_on_values, "the shape does not depend on values"
        return
    compare("values", values, sample.expected, values=not loose)
    if op.name not in UNDEFINED_GRADIENTS:
        compare("gradients", list(found), gradients)


def is_loose(op: Any, drawn: Any) -> bool:
    """Whether values are left open: shapes and dtypes are compared alone."""
    return op.name in UNDEFINED_VALUES | RANDOM or drawn.kwargs.get("dropout_p", 0) > 0


def as_array(x: Any) -> Any:
    return x.detach().jax() if isinstance(x, device.Tensor) else jnp.asarray(to_numpy(x))


Run = Callable[[Any, Sample, Derived | None, bool], None]


def failures(op: Any, dtype: torch.dtype, run: Run) -> Any:
    """How many samples torch itself can run, and what went wrong with which."""
    ran, wrong = 0, []
    some = None if ALL_SAMPLES else 1
    torch.manual_seed(0)
    with precision(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, drawn in enumerate(itertools.islice(samples(op, dtype), some)):
            try:
                sample = Sample.of(op, drawn)
            except (RuntimeError, ValueError, TypeError, AssertionError):
                continue
            ran += 1
            try:
                derived = sample.gradients() if sample.differentiable else None
                run(op, sample, derived, is_loose(op, drawn))
            except Exception as error:
                wrong.append(f"sample {i} ({drawn}): {type(error).__name__}: {error}")
    return ran, wrong


def native_in_bfloat16() -> Iterator[Any]:
    names = {op.name().removeprefix("aten::").split(".")[0] for op in TABLE}
    for op in op_db:
        if torch.bfloat16 in op.supported_dtypes("cpu") and (
            op.aten_name in names or op.name.split(".")[-1] in names
        ):
            yield pytest.param(op, torch.bfloat16, id=f"{op.formatted_name}-bfloat16")


def all_variants() -> Iterator[Any]:
    for entry in itertools.chain(entries(), native_in_bfloat16()):
        for mode in (eager, lowered):
            yield pytest.param(*entry.values, mode, id=f"{entry.id}-{mode.__name__}")


@pytest.mark.parametrize(("op", "dtype", "mode"), list(all_variants()))
def test_operator(op: Any, dtype: torch.dtype, mode: Any, request: Any) -> None:
    ran, wrong = failures(op, dtype, mode)
    name = request.node.callspec.id
    if not ran:
        pytest.skip(f"torch runs no sample of {name} on this CPU")
    if name in EXCEPTIONS:
        if not wrong and not ALL_SAMPLES:
            pytest.skip("its exception is of another sample")
        assert wrong, f"{name} passes: take it out of lowering_exceptions.py"
        pytest.xfail(EXCEPTIONS[name])
    assert not wrong, f"{len(wrong)} of {ran} samples fail\n" + "\n".join(
        text[:2000] for text in wrong
    )


# --- x64 off -------------------------------------------------------------------------------------


def narrow_failures(op: Any, dtype: torch.dtype, layout: str, run: Run) -> tuple[int, list[str]]:
    """How many samples have int64 operands, carried as int32, and what went wrong with which."""
    ran, wrong = 0, []
    some = None if ALL_SAMPLES else 1
    torch.manual_seed(0)
    with precision(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        several = itertools.islice(narrow_samples(op, dtype, layout), some)
        for name, drawn, sample, derived in several:
            ran += 1
            try:
                run(op, sample, derived, is_loose(op, drawn))
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {error}")
    return ran, wrong


def narrow_entries() -> Iterator[Any]:
    """Expanded indices of the operators that take some; all layouts and all operators if asked."""
    layouts = LAYOUTS if ALL_SAMPLES else ("expanded",)
    for entry in entries():
        op, dtype = entry.values
        if (ALL_SAMPLES and dtype in DTYPES) or (
            op.formatted_name in TAKES_INDICES and dtype is torch.float32
        ):
            for layout, mode in itertools.product(layouts, (eager, lowered)):
                name = f"{entry.id}-{layout}-{mode.__name__}"
                yield pytest.param(op, dtype, layout, mode, id=name)


@pytest.mark.parametrize(("op", "dtype", "layout", "mode"), list(narrow_entries()))
def test_int64_that_is_carried_as_int32(
    op: Any, dtype: torch.dtype, layout: str, mode: Any, request: Any
) -> None:
    ran, wrong = narrow_failures(op, dtype, layout, mode)
    name = request.node.callspec.id
    if not ran:
        pytest.skip(f"no sample of {op.formatted_name} has int64 operands that JAX can carry")
    exceptions = EXCEPTIONS | NARROW | (REPEATED_WHEN_EXPANDED if layout == "expanded" else {})
    excepted = exceptions.get(name.replace(f"-{layout}-", "-"))
    if wrong and excepted:  # test_operator tells whether the exception has to go
        pytest.xfail(excepted)
    assert not wrong, f"{len(wrong)} of {ran} samples fail\n" + "\n".join(
        text[:2000] for text in wrong
    )


def test_exceptions_name_operators() -> None:
    assert not set(EXCEPTIONS | NARROW | REPEATED_WHEN_EXPANDED) - {p.id for p in all_variants()}
