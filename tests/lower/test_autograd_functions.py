"""An autograd.Function keeps its derivative under lower=True and device.jit, however it is called.

``apply`` may have been looked up long before a trace, and PyTorch has it in Python or in C++.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torch2jax import device, torch2jax

W = torch.tensor([0.9, 2.0, 1.2, 3.2])
X = torch.tensor([1.3, 0.7, 0.4, 2.2])


class Reversed(torch.autograd.Function):
    """It returns its operand itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, by: float) -> torch.Tensor:  # type: ignore[override]
        ctx.by = by
        return x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # type: ignore[override]
        return -ctx.by * g, None


class Inherited(Reversed):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, by: float) -> torch.Tensor:  # type: ignore[override]
        return Reversed.forward(ctx, x * 1.0, by)


class WithSetup(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, digits: int = 0) -> torch.Tensor:  # type: ignore[override]
        return torch.round(x, decimals=digits)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # type: ignore[override]
        return g * ctx.saved_tensors[0], None


class Several(torch.autograd.Function):
    """It returns a view, a tensor and a number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> Any:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.view(-1), torch.sin(y), 3

    @staticmethod
    def backward(ctx: Any, a: torch.Tensor, b: torch.Tensor, _: Any) -> Any:  # type: ignore[override]
        return 5 * a, b * 7 * ctx.saved_tensors[0]


class SavesResult(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        y = torch.exp(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return 2 * g * y  # 2: only this is the derivative


class KeepsResult(SavesResult):
    """It has its results as an attribute, and something that is none."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> Any:  # type: ignore[override]
        half = torch.exp(x) / 2
        ctx.kept = [half, 2 * half]
        return ctx.kept[1]

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        half, y = ctx.kept
        return g * y * (1 + half)


reverse, inherited, with_setup, several = (
    Reversed.apply,
    Inherited.apply,
    WithSetup.apply,
    Several.apply,
)


def kept_apply(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (reverse(w * x, 2.0) * x).sum()


def apply_of_an_operand(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (Reversed.apply(w, 2.0) * x).sum()


def forward_of_another_class(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (inherited(w, 3.0) * x).sum()


def separate_setup(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (with_setup(w * x) * x * w).sum() + (WithSetup.apply(x, digits=1) * w).sum()


def several_results(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    a, b, n = several(w * x, x)
    return (a * b * n).sum()


def saved_result(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (SavesResult.apply(w * x) * x).sum() + SavesResult.apply(w).sum()


def kept_result(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (KeepsResult.apply(w * x) * x).sum()


def a_block_without_gradients(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = reverse(w * x, 2.0)
    return (y * w).sum()


FUNCTIONS = [
    *(kept_apply, apply_of_an_operand, forward_of_another_class, separate_setup, several_results),
    *(saved_result, kept_result),
    a_block_without_gradients,
]


def derivative_inside(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def inside(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(fn(w, x), x, create_graph=True, materialize_grads=True)
        return (g * w).sum()

    return inside


def by_autograd(fn: Callable[..., Any], kind: str) -> list[np.ndarray]:
    leaves = [t.clone().to(kind).requires_grad_() for t in (W, X)]
    out = (device.jit(fn) if kind == "jax" else fn)(*leaves)
    found = torch.autograd.grad(out, leaves, materialize_grads=True)
    return [t.detach().cpu().numpy() for t in (out, *found)]


def by_jax(fn: Callable[..., Any], **options: Any) -> list[Any]:
    value, found = jax.value_and_grad(torch2jax(fn, **options), (0, 1))(
        jnp.asarray(W.numpy()), jnp.asarray(X.numpy())
    )
    return [value, *found]


INSIDE = [derivative_inside(fn) for fn in FUNCTIONS if fn is not a_block_without_gradients]


@pytest.mark.parametrize("fn", [*FUNCTIONS, *INSIDE])
def test_derivatives(fn: Callable[..., Any]) -> None:
    right = by_autograd(fn, "cpu")
    for found in (by_jax(fn, lower=True), by_jax(fn), by_autograd(fn, "jax")):
        for got, want in zip(found, right, strict=True):
            np.testing.assert_allclose(np.asarray(got), want, rtol=2e-5)


@pytest.mark.filterwarnings("ignore:.*called row by row under jax.vmap")
@pytest.mark.parametrize("fn", [saved_result, kept_result, separate_setup, several_results])
def test_second_derivatives(fn: Callable[..., Any]) -> None:
    """In the backward pass a result has the function's derivative, and all else is constant."""
    leaves = [W.clone().requires_grad_(), X.clone().requires_grad_()]
    first = torch.autograd.grad(fn(*leaves), leaves, create_graph=True)
    want = [torch.autograd.grad((g * W).sum(), leaves, retain_graph=True) for g in first]
    w, x = jnp.asarray(W.numpy()), jnp.asarray(X.numpy())
    for options in ({}, {"lower": True}):
        f = torch2jax(fn, **options)
        for k in range(2):
            row = lambda *a: (jax.grad(f, k)(*a) * W.numpy()).sum()  # noqa: B023, E731
            for found in (jax.grad(row, (0, 1)), jax.jit(jax.grad(row, (0, 1)))):
                for got, right in zip(found(w, x), want[k], strict=True):
                    np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-4)
            # Forward over reverse, by this operand: JAX pushes nothing through what has a
            # backward pass of its own and is not differentiated first.
            hessian = jax.hessian(f, k)(w, x)
            by_torch = torch.autograd.functional.hessian(fn, (W, X))[k][k]
            np.testing.assert_allclose(hessian, by_torch, rtol=1e-4, atol=1e-4)


def test_the_class_is_as_before_after_a_trace() -> None:
    meta = torch.autograd.function.FunctionMeta
    assert "__getattribute__" not in vars(meta)
    by_jax(kept_apply, lower=True)
    assert "__getattribute__" not in vars(meta)
