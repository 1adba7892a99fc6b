"""Derivatives that a function takes itself, under `lower=True`, by PyTorch's operator samples.

The gradient is taken inside by PyTorch's autograd with `create_graph=True`, and JAX differentiates
the function that does it: what autograd saved has to carry JAX's derivative. Right values are
PyTorch's own second derivatives on CPU. One sample of every sixth operator and of those that save
their result; with T2J_ALL_OP_SAMPLES=1, as `make test-ops` sets it, all samples of all operators,
in complex64 too.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import torch
from harness import precision
from inner_exceptions import EXCEPTIONS, SAVING
from lowering_exceptions import RANDOM
from op_exceptions import UNDEFINED_VALUES
from op_samples import ALL_SAMPLES, Sample, compare, cotangent, is_inexact, op_db, samples, to_numpy

from torch2jax import t2j, torch2jax

DTYPES = (torch.float32, torch.complex64) if ALL_SAMPLES else (torch.float32,)


def entries() -> Iterator[Any]:
    for i, op in enumerate(op_db):
        if not ALL_SAMPLES and i % 6 and op.name not in SAVING:
            continue
        for dtype in DTYPES:
            if op.supports_gradgrad and dtype in op.supported_backward_dtypes("cpu"):
                name = f"{op.formatted_name}-{str(dtype).removeprefix('torch.')}"
                yield pytest.param(op, dtype, id=name)


class Inner:
    """``sum(c * gradient)`` as a function of weights, which are 1, of the sample's operands."""

    def __init__(self, sample: Sample) -> None:
        self.sample, self.places = sample, sample.differentiable

    def __call__(self, *weights: torch.Tensor) -> torch.Tensor:
        given: Any = [x.to(weights[0].device) for x in self.sample.operands]
        leaves = [given[i].detach().requires_grad_() for i in self.places]
        for i, x, w in zip(self.places, leaves, weights, strict=True):
            given[i] = x * w
        outs = [x for x in self.sample.smooth(*given) if is_inexact(x) and x.grad_fn is not None]
        found = torch.autograd.grad(
            outs, leaves, weights_of(outs), create_graph=True, allow_unused=True
        )
        found = [g for g in found if g is not None]
        return sum((g * c).sum().real for g, c in zip(found, weights_of(found), strict=True))

    def weights(self) -> list[torch.Tensor]:
        return [torch.ones_like(self.sample.operands[i]) for i in self.places]

    def right(self) -> list[Any] | None:
        """PyTorch's derivatives by the weights; None where it has none."""
        weights = [w.requires_grad_() for w in self.weights()]
        try:
            with torch.enable_grad():
                found = torch.autograd.grad(self(*weights), weights, allow_unused=True)
        except (RuntimeError, AttributeError):
            return None
        pairs = zip(weights, found, strict=True)
        full = [torch.zeros_like(w) if g is None else g for w, g in pairs]
        return [to_numpy(g.conj()) for g in full]


def weights_of(outs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.from_numpy(cotangent(x)).to(x.device, x.dtype) for x in outs]


@pytest.mark.parametrize(("op", "dtype"), list(entries()))
def test_second_derivative(op: Any, dtype: torch.dtype, request: Any) -> None:
    name = request.node.callspec.id
    if op.name in UNDEFINED_VALUES | RANDOM:
        pytest.skip("its values are left open")
    ran, wrong = 0, []
    torch.manual_seed(0)
    with precision(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, drawn in enumerate(itertools.islice(samples(op, dtype), None if ALL_SAMPLES else 1)):
            if drawn.kwargs.get("dropout_p", 0) > 0:
                continue
            try:
                inner = Inner(Sample.of(op, drawn))
            except (RuntimeError, ValueError, TypeError, AssertionError):
                continue
            expected = inner.right() if inner.places else None
            if expected is None or not all(np.isfinite(x).all() for x in expected):
                continue
            ran += 1
            lowered = functools.partial(
                torch2jax(inner, lower=True, stochastic=True), rng=jax.random.key(0)
            )
            weights = [t2j(w) for w in inner.weights()]
            try:
                found = jax.grad(lowered, tuple(range(len(weights))))(*weights)
                compare("second derivatives", list(found), expected)
            except Exception as error:
                wrong.append(f"sample {i} ({drawn}): {type(error).__name__}: {error}")
    if not ran:
        pytest.skip(f"torch takes no second derivative of a sample of {name}")
    if name in EXCEPTIONS:
        if not wrong and not ALL_SAMPLES:
            pytest.skip("its exception is of another sample")
        assert wrong, f"{name} passes: take it out of inner_exceptions.py"
        pytest.xfail(EXCEPTIONS[name])
    assert not wrong, f"{len(wrong)} of {ran} samples fail\n" + "\n".join(t[:2000] for t in wrong)
