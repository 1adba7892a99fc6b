"""t2j and j2t: who shares whose memory."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from conversion_values import (
    FLOAT8,
    NAMES,
    NEEDS_X64,
    check_tensor,
    numbered,
    numpy_values,
    quietly,
    shares,
    torch_values,
)
from harness import precision

from torch2jax import j2t, t2j
from torch2jax._conversions import dtypes


class Annotated(torch.Tensor):
    """A subclass with memory of its own, as torchvision's tv_tensors are."""


def from_unaligned_numpy() -> torch.Tensor:
    raw = np.zeros(256, np.uint8)
    start = -raw.ctypes.data % 64 + 16
    return torch.from_numpy(raw[start : start + 64].view(np.float32))


def dual() -> torch.Tensor:
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        return quietly(lambda: forward_ad.make_dual(numbered(4), torch.ones(4)))


SHARED = {
    "contiguous": lambda: numbered(4, 6),
    "0-d": lambda: torch.tensor(3.0),
    "empty": lambda: torch.empty(0, 3),
    "transposed row": lambda: numbered(1, 5).T,
    "transposed, sizes of 1": lambda: numbered(1, 4, 1, 1).permute(3, 1, 0, 2),
    "arbitrary strides of sizes 1": lambda: torch.empty_strided((5, 1), (1, 77)).fill_(2.0),
    "arbitrary strides of an empty tensor": lambda: torch.empty_strided((2, 0, 3), (1, 5, 77)),
    "aligned slice": lambda: numbered(8, 16)[2:4],
    "view of other shape": lambda: numbered(4, 6).view(2, 12),
    "view of other dtype": lambda: numbered(4, 6).view(torch.int32),
    "bool": lambda: numbered(8) > 3,
    "requires_grad": lambda: numbered(4).requires_grad_(),
    "result of autograd": lambda: numbered(4).requires_grad_().mul(2),
    "nn.Parameter": lambda: torch.nn.Parameter(numbered(4)),
    "frozen nn.Parameter": lambda: torch.nn.Parameter(numbered(4), requires_grad=False),
    "subclass with memory": lambda: numbered(4).as_subclass(Annotated),
    "inference tensor": lambda: torch.inference_mode()(lambda: numbered(4))(),
    "forward-mode dual": dual,
    "conjugated twice": lambda: numbered(4, dtype=torch.complex64).conj().conj(),
}
COPIED = {
    "transposed": lambda: numbered(4, 6).T,
    "permuted": lambda: numbered(2, 3, 4).permute(2, 0, 1),
    "channels last": lambda: numbered(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "step": lambda: numbered(64)[::2],
    "column": lambda: numbered(8, 8)[:, 3:4],
    "expanded": lambda: torch.ones(1).expand(3),
    "diagonal": lambda: numbered(5, 5).diagonal(),
    "unaligned slice": lambda: numbered(64)[1:5],
    "unaligned NumPy memory": from_unaligned_numpy,
    "lazily conjugated": lambda: (numbered(4) + 2j).conj(),
    "lazily negated": lambda: (numbered(4) + 2j).conj().imag,
    "lazily conjugated and transposed": lambda: (numbered(4, 6) + 2j).mH,
    "imaginary part": lambda: (numbered(4) + 2j).imag,
    "parameter, transposed": lambda: torch.nn.Parameter(numbered(4, 6)).T,
}


@pytest.mark.parametrize("label", [*SHARED, *COPIED])
def test_when_t2j_copies(label: str, x64: bool) -> None:
    tensor = {**SHARED, **COPIED}[label]()
    before = (
        tensor.data_ptr(),
        tensor.stride(),
        tensor.requires_grad,
        tensor.is_conj(),
        tensor.is_neg(),
    )
    expected = tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().numpy()
    with precision(x64):
        array = t2j(tensor)
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype
        assert shares(array, tensor) is (label in SHARED)
        # In every jax, whoever takes a row-major array takes this one.
        compiled = (
            jax.jit(lambda x: x.copy())
            .lower(jax.ShapeDtypeStruct(array.shape, array.dtype))
            .compile()
        )
        np.testing.assert_array_equal(compiled(array), expected)
    assert before == (
        tensor.data_ptr(),
        tensor.stride(),
        tensor.requires_grad,
        tensor.is_conj(),
        tensor.is_neg(),
    )


@pytest.mark.parametrize("name", NAMES)
def test_t2j_shares_every_dtype(name: str, x64: bool) -> None:
    """Save int64 while x64 is off, and float8 where DLPack lacks it."""
    tensor = torch_values(name)
    with precision(x64):
        if not x64 and name in NEEDS_X64:
            return  # refused: test_values_both_ways
        by_uint8 = name in FLOAT8 and dtypes._float8_carrier(tensor.dtype) is not None
        assert shares(t2j(tensor), tensor) is not (by_uint8 or (name == "int64" and not x64))


@pytest.mark.parametrize(
    "label", ["0-d", "empty", "transposed", "expanded", "step", "unaligned slice"]
)
def test_int64_of_any_strides_with_x64_off(label: str) -> None:
    tensor = {**SHARED, **COPIED}[label]().to(torch.int64)
    with precision(False):
        array = t2j(tensor)
    np.testing.assert_array_equal(array, tensor.numpy())
    assert array.dtype == np.int32


def test_float8_is_shared_where_dlpack_has_it_and_copied_where_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensor = torch_values("float8_e5m2")
    monkeypatch.setattr(dtypes, "_float8_carrier", lambda dtype: None)
    with contextlib.suppress(
        RuntimeError
    ):  # an older torch: float8 types are not supported by dlpack
        assert shares(t2j(tensor), tensor)
    monkeypatch.setattr(dtypes, "_float8_carrier", lambda dtype: torch.uint8)
    array = t2j(tensor)
    assert not shares(array, tensor)
    assert not shares(array, j2t(array))


@pytest.mark.parametrize("name", NAMES)
def test_j2t_shares_every_dtype(name: str) -> None:
    with precision(True):
        array = jnp.asarray(numpy_values(name))
        tensor = j2t(array)
    by_uint8 = name in FLOAT8 and dtypes._float8_carrier(tensor.dtype) is not None
    assert shares(array, tensor) is not by_uint8


def test_j2t_keeps_the_layout_of_an_array() -> None:
    layout = pytest.importorskip(
        "jax.experimental.layout", reason="layouts are experimental in jax"
    )
    values = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    by_columns = layout.Format(
        layout.Layout((1, 0)), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    array = jax.device_put(values, by_columns)
    tensor = j2t(array)
    assert tensor.stride() == (1, 3)
    assert shares(array, tensor)
    np.testing.assert_array_equal(tensor, values)


def test_j2t_of_a_mesh_of_one_device() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "x")
    array = jax.device_put(
        jnp.arange(4.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    )
    assert shares(array, j2t(array))


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.arange(12, dtype=np.float64).reshape(3, 4),
        lambda: np.arange(12, dtype=np.int64).reshape(3, 4).T[::-1, ::2],
        lambda: np.arange(12, dtype=">f4"),
        lambda: np.broadcast_to(np.float32(3), (2, 2)),
        lambda: np.array(1.5),
        lambda: np.array([1.5, -2]).astype(ml_dtypes.bfloat16)[::-1],
    ],
    ids=["float64", "strides", "big endian", "read-only", "0-d", "bfloat16"],
)
def test_j2t_copies_numpy_arrays(make: Callable[[], np.ndarray], x64: bool) -> None:
    array = make()
    with precision(x64):
        tensor = j2t(array)
    check_tensor(tensor, np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    assert tensor.is_contiguous()
    assert tensor.data_ptr() != array.ctypes.data
    tensor.zero_()
    np.testing.assert_array_equal(array, make())


def test_shared_memory_shows_writes() -> None:
    tensor = numbered(4)
    array = t2j(tensor)
    tensor[0] = 9
    assert array.tolist() == [9, 1, 2, 3]
    array = t2j(tensor.clone())
    tensor[0] = 7
    assert array.tolist() == [9, 1, 2, 3]


def churn() -> None:
    """Collect, then allocate: freed memory is overwritten."""
    gc.collect()
    for _ in range(64):
        torch.full((1000,), -1.0)
        jnp.full((1000,), -1.0).block_until_ready()


def test_arrays_outlive_tensors_and_tensors_outlive_arrays() -> None:
    tensor = numbered(1000)
    array = t2j(tensor)
    del tensor
    churn()
    np.testing.assert_array_equal(array, np.arange(1000.0))
    tensor = j2t(array)
    array.delete()
    del array
    churn()
    np.testing.assert_array_equal(tensor, np.arange(1000.0))


def test_donation_leaves_shared_memory_alone() -> None:
    add = jax.jit(lambda x: x + 100, donate_argnums=0)
    tensor = numbered(1000)
    result = add(t2j(tensor))
    assert not shares(result, tensor)
    np.testing.assert_array_equal(tensor, np.arange(1000.0))
    array = jnp.arange(1000.0)
    tensor = j2t(array)
    result = add(array)
    assert not shares(result, tensor)
    np.testing.assert_array_equal(tensor, np.arange(1000.0))
    np.testing.assert_array_equal(result, np.arange(1000.0) + 100)


def test_j2t_waits_for_the_array() -> None:
    @jax.jit
    def power(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 200, lambda i, y: (y @ x) / 500, x)

    x = jnp.ones((500, 500))
    power(x).block_until_ready()
    np.testing.assert_array_equal(j2t(power(x)).clone(), np.ones((500, 500)))
