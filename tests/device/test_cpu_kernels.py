"""Device jax refuses what PyTorch's kernels for the CPU refuse, with their errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
import torch
import torch._refs as refs
from harness import precision
from op_samples import ALL_SAMPLES
from torch.nn import functional

from torch2jax import Torch2JaxError, device, torch2jax

device.enable()

ones = torch.ones
whole = torch.ones(2, 2, dtype=torch.int64)
mask = torch.ones(2, 2, dtype=torch.bool)
places = torch.zeros(2, dtype=torch.int64)

WRONG: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "softmax of integers": (lambda x: x.softmax(0), (whole,)),
    "std of integers": (lambda x: x.std(), (whole,)),
    "less of complex": (lambda x: x < x, (ones(2) + 0j,)),
    "max of complex": (lambda x: x.max(), (ones(2) + 0j,)),
    "sort of complex": (lambda x: x.sort(), (ones(2) + 0j,)),
    "clamp of complex": (lambda x: x.clamp(0), (ones(2) + 0j,)),
    "floor of complex": (lambda x: x.floor(), (ones(2) + 0j,)),
    "isin of complex": (torch.isin, (ones(2) + 0j, ones(2))),
    "bits of floats": (lambda x: x & 1, (ones(2),)),
    "shift of floats": (lambda x: x << 1, (ones(2),)),
    "gcd of floats": (torch.gcd, (ones(2), ones(2))),
    "bool - True": (lambda x: x - True, (mask,)),
    "1 - bool": (lambda x: 1 - x, (mask,)),
    "alpha that is true": (lambda x: torch.add(x, x, alpha=True), (whole,)),
    "polar of two dtypes": (torch.polar, (ones(2), ones(2).double())),
    "heaviside of two dtypes": (torch.heaviside, (ones(2), ones(2).double())),
    "index_put of another dtype": (lambda x, i, v: x.index_put((i,), v), (
        ones(3), places, ones(2).double())),
    "index_copy of another size": (lambda x, i, v: x.index_copy(0, i, v), (
        ones(3, 3), places, ones(3, 3))),
    "index_add of a matrix": (lambda x, i, v: x.index_add(0, i, v), (
        ones(3, 3), places.reshape(1, 2), ones(2, 3))),
    "put of too few": (lambda x, i, v: x.put(i, v), (ones(3), places, ones(1))),
    "an index of nothing": (lambda x, i: x[:, i], (ones(3, 0), places)),
    "indices that do not broadcast": (lambda x, i, j: x[i, j], (
        ones(3, 3), places, torch.zeros(3, dtype=torch.int64))),
    "clamp": (lambda x: x.clamp(), (ones(2),)),
    "bias of a convolution": (functional.conv2d, (ones(1, 1, 5, 5), ones(1, 1, 2, 2), ones(2))),
    "stride of a convolution": (lambda x, w: functional.conv2d(x, w, stride=0), (
        ones(1, 1, 5, 5), ones(1, 1, 2, 2))),
    "padding of an output": (lambda x, w: functional.conv_transpose2d(x, w, output_padding=3), (
        ones(1, 1, 3, 3), ones(1, 1, 4, 4))),
    "interpolate to nothing": (lambda x: functional.interpolate(x, size=0), (ones(1, 1, 3),)),
    "classes of floats": (lambda x: functional.one_hot(x, 3), (ones(3),)),
}  # fmt: skip


def _eager(fn: Any, operands: Any) -> None:
    fn(*[x.to("jax") for x in operands])


def _compiled(fn: Any, operands: Any) -> None:
    device.jit(fn)(*[x.to("jax") for x in operands])


def _lowered(fn: Any, operands: Any) -> None:
    torch2jax(fn, lower=True)(*[jnp.asarray(x.numpy()) for x in operands])


@pytest.mark.parametrize("way", [_eager, _compiled, _lowered])
@pytest.mark.parametrize("name", WRONG)
def test_the_error_is_that_of_the_kernel(name: str, way: Callable[..., None]) -> None:
    fn, operands = WRONG[name]
    with pytest.raises(Exception) as expected:  # noqa: PT011
        fn(*operands)
    with precision(True), pytest.raises(type(expected.value)) as found:
        way(fn, operands)
    assert str(found.value).splitlines()[0][:40] == str(expected.value).splitlines()[0][:40]


def test_large_operands_are_refused_by_their_dtypes() -> None:
    x = torch.ones(300, 300, device="jax", dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="softmax"):
        x.softmax(0)


def test_what_only_values_can_refuse_is_not_refused_by_other_values() -> None:
    matrix = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    torch.testing.assert_close(matrix.to("jax").inverse().cpu(), matrix.inverse())
    empty = torch.empty(0, device="jax")
    chosen = torch.zeros(3, device="jax").masked_scatter(torch.zeros(3, device="jax") > 1, empty)
    assert chosen.tolist() == [0, 0, 0]
    repeats = torch.tensor([2, 1], device="jax")
    assert repeats.repeat_interleave(repeats, output_size=3).tolist() == [2, 2, 1]
    one = torch.tensor([4], device="jax")
    assert one.index_select(0, torch.tensor([0, 0], device="jax")).tolist() == [4, 4]
    assert functional.embedding(one * 0, one.reshape(1, 1)).tolist() == [[4]]
    lengths = torch.tensor([1, 2], device="jax")
    assert torch.segment_reduce(ones(3, device="jax"), "sum", lengths=lengths).tolist() == [1, 2]


VALUES: dict[str, Callable[[str], Any]] = {
    "cholesky": lambda on: torch.cholesky(-torch.eye(2, device=on)),
    "histc": lambda on: torch.histc(torch.tensor([1.0, torch.nan], device=on)),
    "histc of infinity": lambda on: torch.histc(torch.tensor([1.0, torch.inf], device=on), bins=3),
    "repeats": lambda on: torch.ones(2, device=on).repeat_interleave(
        torch.tensor([1, -1], device=on)
    ),
    "a gradient of another device": lambda on: setattr(
        torch.ones(2, device=on, requires_grad=True), "grad", torch.ones(2, device="meta")
    ),
    "matmul out": lambda on: torch.matmul(
        *[torch.eye(2, device=on)] * 2, out=torch.empty(2, 2, device=on, dtype=torch.float16)
    ),
    "matmul out with a gradient": lambda on: torch.matmul(
        *[torch.eye(2, device=on, requires_grad=True)] * 2, out=torch.empty(2, 2, device=on)
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_wrong_values_are_refused_in_eager_mode(name: str) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011
        VALUES[name]("cpu")
    with pytest.raises(type(expected.value)) as found:
        VALUES[name]("jax")
    assert "lazy" not in str(found.value)


def _into(on: str, fn: Callable[..., Any], dtype: torch.dtype, *args: Any) -> torch.Tensor:
    return fn(*args, out=torch.empty(0, device=on, dtype=dtype))


SAME: dict[str, Callable[[str], Any]] = {
    "matmul out": lambda on: _into(
        on, torch.matmul, torch.float32, torch.ones(4, 2, 3, device=on), torch.ones(3, 2, device=on)
    ),
    "matmul out of nothing": lambda on: _into(
        on, torch.matmul, torch.float32, torch.ones(0, 2, 2, device=on), torch.ones(2, 3, device=on)
    ),
    "linspace out": lambda on: _into(on, torch.linspace, torch.int32, 0.9, 1.9, 7),
    "linspace out of a shape": lambda on: torch.linspace(
        0, 5, 6, out=torch.empty(3, 2, device=on).t()
    ),
    "scatter_add of bools": lambda on: torch.zeros(3, device=on, dtype=torch.bool).scatter_add(
        0, torch.tensor([0, 0, 1], device=on), torch.tensor([True, True, False], device=on)
    ),
    "index_put of bools": lambda on: torch.zeros(3, device=on, dtype=torch.bool).index_put(
        (torch.tensor([0, 0, 1], device=on),),
        torch.tensor([True, True, False], device=on),
        accumulate=True,
    ),
    "index_add of bools": lambda on: torch.zeros(3, device=on, dtype=torch.bool).index_add(
        0, torch.tensor([0, 0], device=on), torch.tensor([True, True], device=on)
    ),
    "binomial": lambda on: torch.binomial(
        torch.tensor([-1.0, 5.0, 5.0, 5.0], device=on),
        torch.tensor([0.5, 2.0, -1.0, 1.0], device=on),
    ),
    "asarray": lambda on: torch.asarray(torch.ones(2, device=on)),
    "mean of a number": lambda on: refs.mean(torch.ones((), device=on), 0),
}


@pytest.mark.parametrize("name", SAME)
def test_a_call_gives_the_same(name: str) -> None:
    with precision(True):
        expected, found = SAME[name]("cpu"), SAME[name]("jax")
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize("on", ["cpu", "jax"])
def test_warnings_of_pytorch(on: str) -> None:
    x = torch.ones(3, device=on)
    index = torch.tensor([1, 0, 1], dtype=torch.uint8, device=on)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        x[index] = x[index] + 1
        x.random_(0, 2**25)
    assert x.shape == (3,)
    assert [str(w.message)[:20] for w in said] == ["indexing with dtype "] * 2 + [
        "to - 1 is out of bou"
    ]


def test_an_address_tells_whether_two_tensors_share_memory() -> None:
    x = torch.ones(3, 4, device="jax")
    assert x.data_ptr() == torch.asarray(x).data_ptr() != x.clone().data_ptr()
    assert x[1].data_ptr() - x.data_ptr() == 4 * x.element_size()
    assert torch.ones(0, device="jax").data_ptr() == 0
    x.requires_grad_().grad = torch.ones(3, 4, device="jax")
    assert x.grad is not None
    del x.grad
    assert x.grad is None


def test_places_beyond_int32() -> None:
    with precision(True):
        x = torch.tensor([5], dtype=torch.int8, device="jax").expand(2**31 + 9)
        assert x[2**31 + 3].item() == 5
        assert x[2**31 :].tolist() == [5] * 9
    with precision(False), pytest.raises(Torch2JaxError, match="64-bit indices"):
        x[2**31 + 4]


@pytest.mark.skipif(not ALL_SAMPLES, reason="two arrays of 2 GiB: make test-ops")
def test_an_array_of_more_than_two_to_the_31_elements() -> None:
    with precision(True):
        x = torch.zeros(2**31 + 9, dtype=torch.int8, device="jax")
        x[-1] = 3
        assert x[2**31 :].tolist() == [0] * 8 + [3]
        assert x.argmax().item() == 2**31 + 8
        assert x[torch.tensor([2**31 + 8], device="jax")].item() == 3
        x[2**31 + 2 : 2**31 + 4].fill_(7)
        assert x.narrow(0, 2**31, 5).tolist() == [0, 0, 7, 7, 0]
