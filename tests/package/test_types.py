"""What a type checker sees of the public face: `make lint` lets pyright read this file.

The right uses have the types that are asserted. Each wrong use is marked with the error that
pyright has to find there: a mark without an error is one itself. At run time they are refused too.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import torch2jax as t2j_module
from torch2jax import (
    SignatureError,
    Size,
    TapeInfo,
    Torch2JaxError,
    dtype_j2t,
    from_module,
    j2t,
    jax2torch,
    jax_module,
    set_tape_budget,
    t2j,
    tape_info,
    to_state_dict,
    torch2jax,
    torch2jax_without_vjp,
)

if TYPE_CHECKING:
    from torch2jax._lower.report import Report

X = jnp.arange(3.0)


def scaled(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return x * factor


def test_right_uses() -> None:
    f = torch2jax(scaled, X, X, depth=2, residuals="recompute", vmap_method="torch")
    assert f(X, X).shape == (3,)
    assert isinstance(assert_type(f.lower(X, X), jax.stages.Lowered), jax.stages.Lowered)
    assert torch2jax_without_vjp(scaled, output_shapes=Size([3]))(X, X).shape == (3,)
    assert isinstance(assert_type(jax.grad(lambda x: f(x, X).sum())(X), Any), jax.Array)

    assert_type(t2j(torch.ones(3)), jax.Array)
    assert_type(j2t(X), torch.Tensor)
    assert_type(j2t(np.ones(3)), torch.Tensor)
    assert_type(dtype_j2t("float32"), torch.dtype)

    apply, variables = from_module(torch.nn.Linear(3, 2))
    assert_type(variables, dict[str, dict[str, Any]])
    assert apply(variables, X, train=False).shape == (2,)
    assert_type(to_state_dict(variables), OrderedDict[str, torch.Tensor])

    assert jax2torch(jnp.tanh)(torch.ones(3)).shape == (3,)
    module = jax_module(lambda w, x: x @ w, jnp.ones((3, 2)))
    assert isinstance(module, torch.nn.Module)
    assert module.to_jax().shape == (3, 2)

    assert_type(tape_info(), TapeInfo)
    assert_type(tape_info().entries, int)
    set_tape_budget(None)
    if TYPE_CHECKING:  # it takes seconds to import
        assert_type(t2j_module.lowering_report(scaled, X, X), Report)


def test_wrong_uses() -> None:
    with pytest.raises((TypeError, Torch2JaxError)):
        torch2jax()  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError):
        torch2jax(scaled, dept=1)  # pyright: ignore[reportCallIssue]
    with pytest.raises(Torch2JaxError):
        torch2jax(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(Torch2JaxError):
        torch2jax(scaled, depth="2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(Torch2JaxError):
        torch2jax(scaled, residuals="tap")  # pyright: ignore[reportArgumentType]
    with pytest.raises(Torch2JaxError):
        torch2jax(scaled, vmap_method="vectorized")  # pyright: ignore[reportArgumentType]
    with pytest.raises(Torch2JaxError):
        t2j([1.0, 2.0])  # pyright: ignore[reportArgumentType]
    with pytest.raises(Torch2JaxError):
        j2t([1.0, 2.0])  # pyright: ignore[reportArgumentType]
    with pytest.raises((TypeError, Torch2JaxError)):
        from_module(torch.nn.Linear)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SignatureError, match="number of bytes"):
        set_tape_budget("1 GB")  # pyright: ignore[reportArgumentType]
    with pytest.raises(AttributeError):
        _ = t2j_module.torch2jaxx  # pyright: ignore[reportAttributeAccessIssue]
