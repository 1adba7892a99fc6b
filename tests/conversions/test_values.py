"""t2j and j2t: values."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conversion_values import NAMES, NEEDS_X64, check_tensor, numpy_values, torch_values
from harness import precision

from torch2jax import UnsupportedDtypeError, j2t, t2j
from torch2jax._conversions import dtypes

NARROW = {"int64": "int32", "uint64": "uint32", "float64": "float32", "complex128": "complex64"}


def check_array(array: jax.Array, values: np.ndarray) -> None:
    assert isinstance(array, jax.Array)
    assert array.dtype == values.dtype
    assert array.shape == values.shape
    assert np.asarray(array).tobytes() == values.tobytes()


SHAPES = [(4, 6), (), (0,), (3, 0, 2), (1, 1, 5)]


@pytest.fixture(params=[False, True], ids=["installed", "by uint8"])
def float8_route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As the installed torch and jax do it, and as if their DLPack did not know float8."""
    if request.param:
        monkeypatch.setattr(dtypes, "_float8_carrier", lambda dtype: torch.uint8)
    return


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("float8_route")
def test_values_both_ways(name: str, shape: tuple[int, ...], x64: bool) -> None:
    values, tensor = numpy_values(name, shape), torch_values(name, shape)
    check_tensor(tensor, values)
    with precision(x64):
        if not x64 and name in NEEDS_X64:
            with pytest.raises(
                UnsupportedDtypeError,
                match=rf"torch\.{name}.*jax_enable_x64.*torch\.{NARROW[name]}",
            ):
                t2j(tensor)
            return
        expected = values if x64 else values.astype(NARROW.get(name, values.dtype))
        array = t2j(tensor)
        check_array(array, expected)
        if shape == SHAPES[0]:
            check_array(jax.jit(lambda x: x.copy())(array), expected)
        check_tensor(j2t(array), expected)
        check_tensor(j2t(jnp.asarray(expected)), expected)
        check_tensor(j2t(values), values)


def test_conversion_while_a_function_is_traced(float8_route: None) -> None:
    constants = [torch_values(name, (3,)) for name in ("float32", "int64", "float8_e5m2")]

    @jax.jit
    def total(x: jax.Array) -> jax.Array:
        arrays = [t2j(c) for c in constants]
        assert not any(isinstance(a, jax.core.Tracer) for a in arrays)
        assert [j2t(a).shape for a in arrays] == [(3,)] * 3
        return sum((a.astype(jnp.float32) for a in arrays), x)

    expected = sum(
        numpy_values(n, (3,)).astype(np.float32) for n in ("float32", "int64", "float8_e5m2")
    )
    np.testing.assert_array_equal(total(jnp.zeros(3)), expected)


def test_arrays_of_64_bits_made_before_x64_went_off() -> None:
    with precision(True):
        arrays = {name: jnp.asarray(numpy_values(name)) for name in NARROW}
    with precision(False):
        for name, array in arrays.items():
            check_tensor(j2t(array), numpy_values(name))


@pytest.mark.parametrize("x", [2**31 - 1, -(2**31)])
def test_int64_that_fits_with_x64_off(x: int) -> None:
    with precision(False):
        array = t2j(torch.tensor([0, x]))
    assert (array.dtype, array.tolist()) == (np.int32, [0, x])


@pytest.mark.parametrize("x", [2**31, -(2**31) - 1, 2**63 - 1, -(2**63)])
def test_int64_that_does_not_fit_with_x64_off(x: int) -> None:
    tensor = torch.tensor([[3, x]])
    with (
        precision(False),
        pytest.raises(UnsupportedDtypeError, match=rf"{x}.*int32.*jax_enable_x64") as caught,
    ):
        t2j(tensor)
    assert isinstance(caught.value, TypeError)
    with precision(True):
        assert t2j(tensor).tolist() == [[3, x]]


def test_tensors_live_where_the_array_lives() -> None:
    array = t2j(torch.ones(3))
    assert array.devices() == {jax.devices("cpu")[0]}
    assert j2t(array).device == torch.device("cpu")
