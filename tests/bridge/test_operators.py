"""PyTorch's own operator samples (`op_db`) through the bridge: values and gradients are torch's.

Two samples of each operator, variant and dtype; all, about 28,000, with T2J_ALL_OP_SAMPLES=1. Once
more with x64 off: what is int64 in a sample then arrives as int32, and PyTorch's values and
gradients for int64 are right.

The tensors of a sample are the operands, everything else is closed over. One jitted program holds
the call and, where torch can differentiate the sample, its pullback.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import precision
from op_exceptions import EXCEPTIONS, EXCEPTIONS_OF_ALL_SAMPLES, UNDEFINED_VALUES
from op_samples import (
    ALL_SAMPLES,
    DTYPES,
    Sample,
    SampleInput,
    all_samples,
    compare,
    entries,
    is_operand,
    samples,
    to_numpy,
)
from torch.utils import _pytree as torch_tree

from torch2jax import t2j, torch2jax

EXPECTED_TO_FAIL = EXCEPTIONS | (EXCEPTIONS_OF_ALL_SAMPLES if ALL_SAMPLES else {})


Derived = tuple[list[np.ndarray], list[np.ndarray]]
"""Cotangents of a sample's inexact results, and torch's gradients."""


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

LAYOUTS = ("contiguous", "strided", "expanded")
"""How the function sees its int64 operands. An operand itself is always contiguous."""

TAKES_INDICES = {
    *("__getitem__", "_segment_reduce_lengths", "_segment_reduce_offsets", "_unsafe_masked_index"),
    *("_unsafe_masked_index_put_accumulate", "gather", "index_add", "index_copy", "index_fill"),
    *("index_put", "index_reduce_amax", "index_reduce_amin", "index_reduce_mean"),
    *("index_reduce_prod", "index_select", "nn_functional_cross_entropy", "nn_functional_ctc_loss"),
    *("nn_functional_embedding", "nn_functional_embedding_bag", "nn_functional_max_unpool1d"),
    *("nn_functional_max_unpool2d", "nn_functional_max_unpool3d", "nn_functional_nll_loss"),
    *("nn_functional_multi_margin_loss", "nn_functional_multilabel_margin_loss", "put"),
    *("nn_functional_linear_cross_entropy", "repeat_interleave", "scatter", "scatter_add"),
    *("scatter_reduce_amax", "scatter_reduce_amin", "scatter_reduce_mean", "scatter_reduce_prod"),
    *("scatter_reduce_sum", "searchsorted", "take", "take_along_dim"),
}
"""Operators whose samples of float32 hold tensors of int64."""


def in_layout(x: Any, layout: str) -> Any:
    """A leaf of a sample with the values that it has in a layout."""
    if not (is_operand(x) and x.dtype is torch.int64 and x.ndim) or layout != "expanded":
        return x
    return x[..., :1].expand(x.shape)


def arriving(sample: Sample, layout: str) -> Sample:
    """The sample as a function of contiguous operands, which gives the operator another layout."""
    chosen = [i for i, x in enumerate(sample.operands) if x.dtype is torch.int64 and x.ndim]
    shapes = [x.shape for x in sample.operands]

    def stored(x: torch.Tensor) -> torch.Tensor:
        if layout == "strided":
            return torch.stack([x, x.flip(0)], -1)
        return x[..., :1].contiguous() if layout == "expanded" else x.contiguous()

    def seen(operands: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        xs = list(operands)
        for i in chosen:
            if layout == "strided":
                xs[i] = xs[i].select(-1, 0)
            elif layout == "expanded":
                xs[i] = xs[i].expand(shapes[i])
        return xs

    operands = [stored(x) if i in chosen else x for i, x in enumerate(sample.operands)]
    return replace(
        sample,
        operands=operands,
        function=lambda *xs: sample.function(*seen(xs)),
        smooth=lambda *xs: sample.smooth(*seen(xs)),
    )


def canonical(x: Any) -> np.ndarray:
    """A result of torch's as JAX carries it with x64 off."""
    array = to_numpy(x)
    narrow = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
    if array.dtype == np.int64 and not np.array_equal(narrow, array):
        raise OverflowError
    return narrow


def narrow_failures(
    op: Any, dtype: torch.dtype, layout: str, number: int | None
) -> tuple[int, list[str]]:
    """How many samples have int64 operands that arrive as int32, and what went wrong with which."""
    ran, wrong = 0, []
    torch.manual_seed(0)
    with precision(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about deprecated operators
        for i, drawn in enumerate(all_samples(op, dtype)):
            if ran == number:
                break
            try:
                leaves = torch_tree.tree_map(
                    lambda x: in_layout(x, layout), (drawn.input, drawn.args, drawn.kwargs)
                )
                given = SampleInput(leaves[0], args=leaves[1], kwargs=leaves[2])
                given.output_process_fn_grad = drawn.output_process_fn_grad
                sample = arriving(Sample.of(op, given), layout)
                with torch.no_grad():
                    expected = [canonical(x) for x in sample.function(*sample.operands)]
                derived = sample.gradients() if sample.differentiable else None
            except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, OverflowError):
                continue  # torch itself cannot run it, or JAX cannot carry it
            dtypes = {x.dtype for x in sample.operands}
            if torch.int64 not in dtypes or dtypes & {torch.float64, torch.complex128}:
                continue
            ran += 1
            try:
                run(op, replace(sample, expected=expected), derived)
            except Exception as error:
                wrong.append(f"sample {i} ({drawn}): {type(error).__name__}: {error}")
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
