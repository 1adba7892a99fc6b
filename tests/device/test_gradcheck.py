"""gradcheck and gradgradcheck of PyTorch's own operator samples on device jax, in float64.

The smallest sample of each fifth operator, by its name, because the programs of all take five
minutes to compile. With T2J_ALL_OP_SAMPLES=1, as `make test-ops` sets it, all samples of all.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import precision
from op_samples import ALL_SAMPLES, op_db
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import _pytree as torch_tree

from torch2jax import device

device.enable()

SHARE = 1 if ALL_SAMPLES else 5
SAMPLES = 20
"""The smallest of so many samples is taken."""

DIFFERS: dict[str, str] = {}
"""Operators whose derivative is not that of their values, with reasons."""

OPS = [
    op
    for op in op_db
    if op.supports_autograd
    and torch.float64 in op.supported_backward_dtypes("cpu")
    and not op.name.startswith("jiterator")
    and zlib.crc32(op.full_name.encode()) % SHARE == 0
]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.full_name)
def test_gradcheck(op: Any) -> None:
    if op.full_name in DIFFERS:
        pytest.skip(DIFFERS[op.full_name])
    with precision(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in _samples(op):
            error = _wrong(op, sample, "jax")
            # PyTorch's table lists derivatives that PyTorch does not have, or not of float64.
            assert error is None or _wrong(op, sample, "cpu") is not None, error


def _samples(op: Any) -> Iterator[Any]:
    torch.manual_seed(0)
    found: list[tuple[int, Any]] = []
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        leaves = [x for x in torch_tree.tree_leaves(_arguments(sample)) if _is_tensor(x)]
        count = sum(x.numel() for x in leaves)
        dense = all(x.layout is torch.strided for x in leaves)
        if count and dense and any(x.requires_grad for x in leaves):
            found.append((count, sample))
        if len(found) == SAMPLES and not ALL_SAMPLES:
            break
    if ALL_SAMPLES:
        yield from [sample for _, sample in found]
    elif found:
        yield min(found, key=lambda item: item[0])[1]


def _arguments(sample: Any) -> tuple[Any, ...]:
    return sample.input, sample.args, sample.kwargs


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _wrong(op: Any, sample: Any, on: str) -> Exception | None:
    """Return what gradcheck and gradgradcheck have to say against an operator on a device."""
    leaves, structure = torch_tree.tree_flatten(_arguments(sample))
    leaves = [_moved(x, on) for x in leaves]
    places = [i for i, x in enumerate(leaves) if _is_tensor(x) and x.requires_grad]

    def fn(*chosen: Any) -> Any:
        full = list(leaves)
        for i, x in zip(places, chosen, strict=True):
            full[i] = x
        x, args, kwargs = torch_tree.tree_unflatten(full, structure)
        out = op.gradcheck_wrapper(op.op, x, *args, **kwargs)
        if sample.output_process_fn_grad is not None:
            out = sample.output_process_fn_grad(out)
        return tuple([y for y in torch_tree.tree_leaves(out) if _is_tensor(y) and y.requires_grad])

    inputs = [leaves[i] for i in places]
    options: dict[str, Any] = {
        "fast_mode": True,
        "nondet_tol": op.gradcheck_nondet_tol,
        "check_undefined_grad": False,
    }
    try:
        gradcheck(fn, inputs, check_batched_grad=False, **options)
        if op.supports_gradgrad:
            gradgradcheck(fn, inputs, gen_non_contig_grad_outputs=False, **options)
    except Exception as error:
        return error
    return None


def _moved(x: Any, on: str) -> Any:
    if not _is_tensor(x):
        return torch.device(on) if type(x) is torch.device or x == "cpu" else x
    return x.detach().clone().to(on).requires_grad_(x.requires_grad)
