"""Arrays of 4 bits, which PyTorch shows as wider ones, and dtypes that NumPy lacks."""

from __future__ import annotations

import copy
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from torch2jax import torchax
from torch2jax._errors import UnsupportedDtypeError

interop: Any = torchax.interop
VALUES = np.array([[0, 1, 2], [3, 4, 6]], np.int32)  # every one of these dtypes has them
CASES = [
    pytest.param(jnp.int4, torch.int8, np.int8, id="int4"),
    pytest.param(jnp.uint4, torch.uint8, np.uint8, id="uint4"),
    pytest.param(jnp.float4_e2m1fn, torch.float4_e2m1fn_x2, np.float32, id="float4"),
]


@pytest.mark.parametrize(("small", "shown", "wide"), CASES)
def test_tensors_of_small_dtypes(small: Any, shown: torch.dtype, wide: Any) -> None:
    a = jnp.asarray(VALUES).astype(small)
    x = interop.torch_view(a)
    values = torch.from_numpy(VALUES.astype(wide))
    assert x.dtype is shown
    assert interop.jax_view(x) is a
    kept: Any
    for kept in (x.T, x[0], x.detach(), torch.nn.Parameter(x, False), x.clone(), copy.deepcopy(x)):
        assert kept.jax().dtype == small
    assert x.tolist() == values.tolist()
    assert repr(x).startswith(repr(values)[:-1].split(", dtype")[0])
    assert x[1, 2].item() == 6
    assert x.numpy().dtype == np.dtype(small)
    for f in (
        lambda x: x + 1,
        lambda x: x * x * x,
        lambda x: x[1] * 5,
        lambda x: x.T.reshape(-1) - 1,
        lambda x: torch.cat([x, x]),
        lambda x: x.float() @ x.float().T,
        lambda x: torch.where(x > 2, x, -x),
    ):
        for got in (f(x), interop.jax_jit(f)(x)):
            assert torch.equal(got.cpu(), f(values))
    assert x.cpu().tolist() == values.tolist()
    x[0].fill_(3)
    x[1].copy_(torch.ones(3, device="jax"))
    assert x._elem.dtype == small
    assert x.tolist() == [[3, 3, 3], [1, 1, 1]]
    assert interop.call_jax(lambda a: a.astype(small), x).dtype is shown
    assert torchax.ops.mappings.j2t_dtype(small) is shown


def test_bits_of_small_dtypes() -> None:
    x = interop.torch_view(jnp.asarray([1, -1], jnp.int4))
    seen = x.view(torch.uint8)
    assert seen.tolist() == [1, 255]
    seen.add_(1)
    assert x.tolist() == [2, 0]
    assert x._elem.dtype == jnp.int4
    x = interop.torch_view(jnp.ones(2, jnp.float4_e2m1fn))
    with pytest.raises(UnsupportedDtypeError, match="PyTorch packs two"):
        x.view(torch.uint8).tolist()


def test_numpy_arrays_of_dtypes_that_numpy_lacks() -> None:
    x: Any = torch.ones(2, device="jax")
    assert x.bfloat16().numpy().dtype == ml_dtypes.bfloat16
    assert x.to(torch.float8_e5m2).numpy().tolist() == [1.0, 1.0]
    assert x.long().numpy().dtype == np.int64
    x.bfloat16().numpy()[0] = 5  # it is a copy
    assert x.tolist() == [1.0, 1.0]


def test_the_array_of_a_tensor_is_replaced() -> None:
    x: Any = torch.ones(3, device="jax")
    row, seen = x[:1], x.detach()
    x._elem = jnp.zeros(3)
    assert x.tolist() == seen.tolist() == [0.0] * 3
    assert row.tolist() == [0.0]
    x._elem = jnp.zeros((2, 2), jnp.int32)
    assert (tuple(x.shape), x.dtype) == ((2, 2), torch.int32)
    assert x._elem is x.jax()
    with pytest.raises(ValueError, match="_elem of a view"):
        row._elem = jnp.zeros(3)
    p: Any = torch.nn.Parameter(torch.ones(2, device="jax"))
    p._elem = jnp.full(2, 7.0)
    assert p.requires_grad
    assert p.tolist() == [7.0, 7.0]
    assert x._env is torchax.default_env()

    @interop.jax_jit
    def doubled(x: Any) -> Any:
        y = x.clone()
        y._elem = y._elem * 2
        return y

    assert doubled(p.detach()).tolist() == [14.0, 14.0]


def test_which_tensors_are_of_jax() -> None:
    assert not hasattr(torch.ones(2), "jax")
    assert hasattr(torch.ones(2, device="jax"), "jax")
    assert not torch.ones(2).is_jax  # type: ignore[attr-defined]
    host = torchax.ops.mappings.j2t(torch.ones(2, device="jax"))
    assert type(host) is torch.Tensor
    assert host.device.type == "cpu"
