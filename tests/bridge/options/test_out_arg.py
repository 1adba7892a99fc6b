"""`out_arg`: functions that write into XLA's buffer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from option_functions import X, same, sds

from torch2jax import Size, Torch2JaxError, torch2jax


def test_out_arg_gets_xlas_buffer() -> None:
    places: list[int] = []

    def fn(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is not None:
            places.append(out.data_ptr())
        return torch.add(a, b, out=out)

    f = torch2jax(fn, out_arg="out")
    for run in (f, jax.jit(f)):
        out = jax.block_until_ready(run(X, X))
        same(out, 2 * X)
        assert places[-1] == out.unsafe_buffer_pointer()
    same(jax.grad(lambda a: f(a, X).sum())(X), np.ones(4))
    same(jax.jacfwd(f)(X, X), np.eye(4))
    same(jax.vmap(f, (0, None))(np.stack([X, X]), X), np.stack([2 * X, 2 * X]))


def test_out_arg_of_torchs_own_functions() -> None:
    f = torch2jax(torch.add, out_arg="out")
    same(f(X, X), 2 * X)
    same(jax.grad(lambda a: f(a, X).sum())(X), np.ones(4))


def test_out_arg_that_fn_requires() -> None:
    """Most functions with a preallocated result, a kernel for instance, cannot do without it."""

    def fn(a: torch.Tensor, *, out: torch.Tensor) -> None:
        torch.sin(a, out=out)

    f = torch2jax(fn, out_arg="out", output_shapes=Size([4]))
    same(f(X), np.sin(X))
    same(jax.jit(f)(X), np.sin(X))


def test_out_arg_by_position() -> None:
    f = torch2jax(lambda a, out: torch.sin(a, out=out), out_arg="out", output_shapes=Size([4]))
    same(f(X), np.sin(X))


def test_out_arg_of_a_tuple() -> None:
    shapes = (sds(2), sds(2, dtype=jnp.int32))

    def fn(a: torch.Tensor, out: Any = None) -> None:
        values, indices = torch.topk(a, 2)
        out[0].copy_(values)
        out[1].copy_(indices)

    same(torch2jax(fn, out_arg="out", output_shapes=shapes)(X), tuple(jax.lax.top_k(X, 2)))


def test_out_arg_that_fn_does_not_write() -> None:
    """What fn returns instead counts, or it is an error; never XLA's uninitialised memory."""
    f = torch2jax(lambda a, out=None: a + 1, out_arg="out")
    try:
        result = f(X)
    except Torch2JaxError:
        return
    same(result, X + 1)
