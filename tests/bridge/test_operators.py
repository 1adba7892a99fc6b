"""PyTorch's own operator samples (`op_db`) through the bridge: values and gradients are torch's.

Two samples of each operator, variant and dtype; all, about 28,000, with T2J_ALL_OP_SAMPLES=1. Once
more with x64 off: what is int64 in a sample then arrives as int32, and PyTorch's values and
gradients for int64 are right.

The tensors of a sample are the operands, everything else is closed over. One jitted program holds
the call and, where torch can differentiate the sample, its pullback.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import precision
from narrow_samples import LAYOUTS, TAKES_INDICES, narrow_samples
from op_exceptions import EXCEPTIONS, EXCEPTIONS_OF_ALL_SAMPLES, UNDEFINED_VALUES
from op_samples import ALL_SAMPLES, DTYPES, Derived, Sample, compare, entries, samples

from torch2jax import t2j, torch2jax

EXPECTED_TO_FAIL = EXCEPTIONS | (EXCEPTIONS_OF_ALL_SAMPLES if ALL_SAMPLES else {})


def run(op: Any, sample: Sample, derived: Derived | None) -> None:
    """One program with the call and the pullback of a sample, against torch."""
    arrays = [t2j(operand) for operand in sample.operands]
    cotangents, gradients = derived or ([], [])
    function = torch2jax(sample.function, output_shapes=sample.shapes)
    smooth_function = torch2jax(sample.smooth, output_shapes=sample.smooth_shapes)

    def program(arrays: list[jax.Array], cotangents: list[np.ndarray]) -> Any:
        values = function(*arrays)
        if not derived:
            return values, []

        def smooth(*chosen: jax.Array) -> list[jax.Array]:
            full = list(arrays)
            for i, x in zip(sample.differentiable, chosen, strict=True):
                full[i] = x
            outs = smooth_function(*full)
            return [out for out in outs if jnp.issubdtype(out.dtype, jnp.inexact)]

        _, pull = jax.vjp(smooth, *[arrays[i] for i in sample.differentiable])
        return values, pull(cotangents)

    values, found = jax.jit(program)(arrays, cotangents)
    compare("values", values, sample.expected, values=op.name not in UNDEFINED_VALUES)
    compare("gradients", found, gradients)


def failures(op: Any, dtype: torch.dtype) -> tuple[int, list[str]]:
    """How many samples torch itself can run, and what went wrong with which."""
    ran, wrong = 0, []
    torch.manual_seed(0)
    with precision(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about deprecated operators
        for i, drawn in enumerate(samples(op, dtype)):
            try:
                sample = Sample.of(op, drawn)
            except (RuntimeError, ValueError, TypeError, AssertionError):
                continue  # torch itself cannot run the sample on a CPU
            ran += 1
            try:
                run(op, sample, sample.gradients() if sample.differentiable else None)
            except Exception as error:
                wrong.append(f"sample {i} ({drawn}): {type(error).__name__}: {error}")
    return ran, wrong


@pytest.mark.parametrize(("op", "dtype"), list(entries()))
def test_operator(op: Any, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    ran, wrong = failures(op, dtype)
    if not ran:
        pytest.skip(f"torch runs no sample of {name} on this CPU")
    if name in EXPECTED_TO_FAIL:
        assert wrong, f"{name} passes: take it out of op_exceptions.py"
        pytest.xfail(EXPECTED_TO_FAIL[name])
    assert not wrong, f"{len(wrong)} of {ran} samples fail\n" + "\n".join(
        text[:2000] for text in wrong
    )


# --- x64 off -------------------------------------------------------------------------------------


def narrow_failures(
    op: Any, dtype: torch.dtype, layout: str, number: int | None
) -> tuple[int, list[str]]:
    """How many samples have int64 operands that arrive as int32, and what went wrong with which."""
    ran, wrong = 0, []
    torch.manual_seed(0)
    with precision(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about deprecated operators
        several = itertools.islice(narrow_samples(op, dtype, layout), number)
        for name, _, sample, derived in several:
            ran += 1
            try:
                run(op, sample, derived)
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {error}")
    return ran, wrong


def narrow_entries() -> Iterator[Any]:
    """Three samples of each operator that takes indices; all samples of all operators if asked."""
    for entry in entries():
        op, dtype = entry.values
        if dtype in DTYPES and (ALL_SAMPLES or op.formatted_name in TAKES_INDICES):
            for layout in LAYOUTS:
                yield pytest.param(op, dtype, layout, id=f"{entry.id}-{layout}")


@pytest.mark.parametrize(("op", "dtype", "layout"), list(narrow_entries()))
def test_int64_that_arrives_as_int32(op: Any, dtype: torch.dtype, layout: str) -> None:
    ran, wrong = narrow_failures(op, dtype, layout, None if ALL_SAMPLES else 3)
    if not ran:
        pytest.skip(f"no sample of {op.formatted_name} has int64 operands that JAX can carry")
    assert not wrong, f"{len(wrong)} of {ran} samples fail\n" + "\n".join(
        text[:2000] for text in wrong
    )


def test_exceptions_name_operators() -> None:
    """Every exception names an operator that is tested."""
    names = {entry.id for entry in entries()}
    assert not (set(EXCEPTIONS) | set(EXCEPTIONS_OF_ALL_SAMPLES)) - names
