"""PyTorch's own operator samples (`op_db`) through the bridge: values and gradients are torch's.

Two samples of each operator, variant and dtype; all, about 28,000, with T2J_ALL_OP_SAMPLES=1.

The tensors of a sample are the operands, everything else is closed over. One jitted program holds
the call and, where torch can differentiate the sample, its pullback.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import precision
from op_exceptions import EXCEPTIONS, EXCEPTIONS_OF_ALL_SAMPLES, UNDEFINED_VALUES
from op_samples import ALL_SAMPLES, Sample, compare, entries, samples

from torch2jax import t2j, torch2jax

EXPECTED_TO_FAIL = EXCEPTIONS | (EXCEPTIONS_OF_ALL_SAMPLES if ALL_SAMPLES else {})


def run(op: Any, sample: Sample) -> None:
    """One program with the call and the pullback of a sample, against torch."""
    arrays = [t2j(operand) for operand in sample.operands]
    derived = sample.gradients() if sample.differentiable else None
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
                run(op, sample)
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


def test_exceptions_name_operators() -> None:
    """Every exception names an operator that is tested."""
    names = {entry.id for entry in entries()}
    assert not (set(EXCEPTIONS) | set(EXCEPTIONS_OF_ALL_SAMPLES)) - names
