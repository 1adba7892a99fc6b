"""Numbers beyond int32 beside int64 that JAX carries as int32: right values, or an error.

The greatest and the least int64 stand for what a minimum or a maximum shall not find. Right values
are PyTorch's with int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torch2jax import Torch2JaxError, TorchCallError, device, torch2jax

device.enable()

X = torch.tensor([[3, -1, 4], [1, 5, -9]])
MASK = torch.tensor([[True, False, True], [False, True, True]])
MOST, LEAST = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

EXTREMES: dict[str, Function] = {
    "masked.amax": lambda x, m: torch.masked.amax(x, 1, mask=m),
    "masked.amin": lambda x, m: torch.masked.amin(x, 1, mask=m),
    "masked.argmax": lambda x, m: torch.masked.argmax(x, 1, mask=m),
    "where": lambda x, m: torch.where(m, x, torch.iinfo(x.dtype).max).amin(1),
    "full_like": lambda x, m: torch.where(m, x, torch.full_like(x, MOST)).amin(1),
    "new_full": lambda x, m: x.new_full((2,), LEAST).maximum(x[:, 0]),
    "full": lambda x, m: (
        torch.full((3,), MOST, device=x.device)
        .scatter_reduce(0, x[0] % 3, x[0], "amin")
        .clamp(-9, 9)
    ),
    "fill_": lambda x, m: torch.empty_like(x).fill_(MOST).minimum(x),
    "masked_fill": lambda x, m: x.masked_fill(~m, LEAST).amax(1),
    "masked_fill_": lambda x, m: x.clone().masked_fill_(~m, MOST).amin(1),
    "index_fill": lambda x, m: x.index_fill(1, torch.zeros_like(x[0, :1]), MOST).amin(1),
    "scatter": lambda x, m: x.scatter(1, torch.zeros_like(x[:, :1]), MOST).amin(1),
    "pad": lambda x, m: F.pad(x, (1, 1), value=LEAST).amax(1),
    "clamp": lambda x, m: x.clamp(-(2**40), MOST) + x.clamp(min=LEAST),
    "comparison": lambda x, m: x.lt(MOST) & x.ne(LEAST),
    "tensor": lambda x, m: torch.maximum(torch.tensor(LEAST).to(x.device), x),
    "new_tensor": lambda x, m: torch.maximum(x, x.new_tensor([LEAST, 0, 1])),
}


def run(fn: Function, surface: str) -> Any:
    if surface == "device":
        return fn(X.to("jax"), MASK.to("jax")).cpu().numpy()
    f = torch2jax(fn, lower=surface == "lower")
    if surface == "lower":
        f = jax.jit(f)
    return f(jnp.asarray(X.numpy()), jnp.asarray(MASK.numpy()))


@pytest.mark.filterwarnings("ignore:.*(masked.*prototype|MaskedTensors|refuses int32)")
@pytest.mark.parametrize("surface", ["bridge", "lower", "device"])
@pytest.mark.parametrize("name", list(EXTREMES))
def test_extremes_keep_their_meaning(name: str, surface: str) -> None:
    expected = EXTREMES[name](X, MASK)
    np.testing.assert_array_equal(run(EXTREMES[name], surface), expected.numpy())


def test_floats_hold_the_extremes_of_int64() -> None:
    def fill(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        least = torch.full_like(x, LEAST, dtype=torch.float)
        return x.float().masked_fill(m, MOST) + least

    expected = fill(X, MASK).numpy()
    for surface in ("bridge", "lower", "device"):
        np.testing.assert_array_equal(run(fill, surface), expected)


# JAX itself drops the upper bits in jnp.full.
WIDE: dict[str, Function] = {
    "add": lambda x, m: (x + 2**33) % 7,
    "full_like": lambda x, m: torch.full_like(x, 2**40).minimum(x),
    "new_full": lambda x, m: x.new_full((), -(2**40)).maximum(x),
    "full": lambda x, m: torch.full((3,), 2**40, device=x.device).minimum(x),
    "where": lambda x, m: torch.where(m, x, 2**40).amin(1),
    "comparison": lambda x, m: x < 2**40,
    "tensor": lambda x, m: torch.minimum(torch.tensor(2**40).to(x.device), x),
}


@pytest.mark.parametrize("name", list(WIDE))
def test_other_numbers_are_right_on_the_bridge_and_errors_elsewhere(name: str) -> None:
    """The bridge takes the operand as int64. JAX's programs have int32, and no number is cut."""
    fn = WIDE[name]
    if name != "where":  # PyTorch asks for int64 before an operator runs
        np.testing.assert_array_equal(run(fn, "bridge"), fn(X, MASK).numpy())
    for surface in ("lower", "device"):
        with pytest.raises((OverflowError, Torch2JaxError), match="int32"):
            run(fn, surface)


def test_uint64() -> None:
    """PyTorch cannot say the least and the greatest of such numbers."""
    f = torch2jax(lambda x: x.to(torch.uint64))
    found = f(jnp.arange(3))
    assert found.dtype == jnp.uint32
    np.testing.assert_array_equal(found, [0, 1, 2])
    with pytest.raises(TorchCallError, match="18446744073709551615, which does not fit"):
        f(jnp.arange(3) - 1)
