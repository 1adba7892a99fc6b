"""t2j, j2t, their trees and dtypes: values, who shares whose memory, and every refusal."""

from __future__ import annotations

import contextlib
import doctest
import gc
import os
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from harness import precision
from torch._subclasses.fake_tensor import FakeTensorMode

import torch2jax
from torch2jax import (
    SignatureError,
    Torch2JaxError,
    UnsupportedDtypeError,
    _convert,
    _dtypes,
    dtype_j2t,
    dtype_t2j,
    j2t,
    t2j,
    tree_j2t,
    tree_t2j,
)

FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]
NAMES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *(name for name in FLOAT8 if hasattr(torch, name)),
]
NARROW = {"int64": "int32", "uint64": "uint32", "float64": "float32", "complex128": "complex64"}
NEEDS_X64 = ["uint64", "float64", "complex128"]


def numpy_dtype(name: str) -> np.dtype:
    """The dtype from NumPy's or ml_dtypes' own table."""
    return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


def numpy_values(name: str, shape: tuple[int, ...] = (4, 6)) -> np.ndarray:
    """Values that every dtype holds exactly, some negative where there is a sign."""
    dtype = numpy_dtype(name)
    signed = dtype.kind not in "iu" and name not in ("bool", "float8_e8m0fnu")
    count = np.arange(np.prod(shape))
    return (np.exp2(count % 5) * (-1.0) ** (signed * count)).reshape(shape).astype(dtype)


def torch_values(name: str, shape: tuple[int, ...] = (4, 6)) -> torch.Tensor:
    """The same values, made by torch."""
    values = numpy_values(name, shape)
    wide = torch.from_numpy(values if values.dtype.isbuiltin == 1 else values.astype(np.float32))
    return wide.to(getattr(torch, name), copy=True)


def quietly(make: Callable[[], Any]) -> Any:
    """What make returns; torch warns that some kinds of tensors are prototypes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def shares(array: jax.Array, tensor: torch.Tensor) -> bool:
    return array.unsafe_buffer_pointer() == tensor.data_ptr()


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_have_one_name_on_both_sides(name: str, x64: bool) -> None:
    with precision(x64):
        assert dtype_t2j(getattr(torch, name)) == numpy_dtype(name)
        assert dtype_j2t(numpy_dtype(name)) is getattr(torch, name)


@pytest.mark.parametrize("name", NAMES)
def test_every_spelling_of_a_dtype(name: str) -> None:
    expected = getattr(torch, name)
    scalar_type = getattr(jnp, "bool_" if name == "bool" else name)
    dtype = numpy_dtype(name)
    for spelling in (name, scalar_type, dtype.type, dtype, dtype.newbyteorder("S")):
        assert dtype_j2t(spelling) is expected, spelling


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("f4", torch.float32),
        (float, torch.float64),
        (int, torch.int64),
        (complex, torch.complex128),
        ("?", torch.bool),
    ],
)
def test_spellings_of_numpy(spelling: Any, expected: torch.dtype) -> None:
    assert dtype_j2t(spelling) is expected


@pytest.mark.parametrize("name", NAMES)
def test_canonical_is_what_jax_makes_of_it(name: str, x64: bool) -> None:
    with precision(x64):
        assert (
            _dtypes.canonical(getattr(torch, name))
            == jnp.asarray(np.zeros(3, numpy_dtype(name))).dtype
        )
        assert _dtypes.x64_enabled() is x64


UNKNOWN_TO_JAX = [
    "complex32",
    "qint8",
    "quint8",
    "qint32",
    "quint4x2",
    "bits8",
    "int4",
    "float4_e2m1fn_x2",
]


@pytest.mark.parametrize("name", [name for name in UNKNOWN_TO_JAX if hasattr(torch, name)])
def test_torch_dtypes_that_jax_lacks(name: str) -> None:
    with pytest.raises(
        UnsupportedDtypeError,
        match=rf"torch\.{name}\. Supported: torch\.bool, .*torch\.float8_e5m2",
    ):
        dtype_t2j(getattr(torch, name))


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (jnp.int4, r"int4\. Supported: bool, int8.*astype"),
        ("uint4", r"uint4\. Supported"),
        (jnp.float8_e4m3b11fnuz, r"float8_e4m3b11fnuz\. Supported"),
        (jax.random.key(0).dtype, r"key<fry>.*jax\.random\.key_data"),
        (jax.dtypes.float0, r"float0.*zero"),
        ("S3", r"S3\. Supported"),
        (object, r"object\. Supported"),
    ],
)
def test_jax_dtypes_that_torch_lacks(dtype: Any, words: str) -> None:
    with pytest.raises(UnsupportedDtypeError, match=words):
        dtype_j2t(dtype)


@pytest.mark.parametrize(
    ("convert", "wrong", "words"),
    [
        (dtype_t2j, np.dtype("int8"), r"takes a torch\.dtype, got dtype\('int8'\).*dtype_j2t"),
        (dtype_t2j, [], r"takes a torch\.dtype, got \[\] of type list"),
        (dtype_j2t, torch.int8, r"got torch\.int8 of type torch\.dtype\. dtype_t2j goes"),
        (dtype_j2t, None, "got None of type NoneType"),
        (dtype_j2t, "float33", "got 'float33' of type str"),
    ],
)
def test_what_is_no_dtype(convert: Callable[[Any], Any], wrong: Any, words: str) -> None:
    with pytest.raises(SignatureError, match=words):
        convert(wrong)


# --- values --------------------------------------------------------------------------------------


def check_array(array: jax.Array, values: np.ndarray) -> None:
    assert isinstance(array, jax.Array)
    assert array.dtype == values.dtype
    assert array.shape == values.shape
    assert np.asarray(array).tobytes() == values.tobytes()


def check_tensor(tensor: torch.Tensor, values: np.ndarray) -> None:
    assert type(tensor) is torch.Tensor
    assert not tensor.requires_grad
    assert str(tensor.dtype) == f"torch.{values.dtype.name}"
    assert tuple(tensor.shape) == values.shape
    if values.size:
        assert (
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == values.tobytes()
        )


SHAPES = [(4, 6), (), (0,), (3, 0, 2), (1, 1, 5)]


@pytest.fixture(params=[False, True], ids=["installed", "by uint8"])
def float8_route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As the installed torch and jax do it, and as if their DLPack did not know float8."""
    if request.param:
        monkeypatch.setattr(_dtypes, "_float8_carrier", lambda dtype: torch.uint8)
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


def test_arrays_live_where_the_tensor_lives() -> None:
    array = t2j(torch.ones(3))
    assert array.devices() == {jax.devices("cpu")[0]}
    assert array.committed
    assert j2t(array).device == torch.device("cpu")


# --- who shares whose memory: the table of docs/conversions.md -----------------------------------


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(int(np.prod(shape)), dtype=torch.int64).to(dtype, copy=True).reshape(shape)


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
        by_uint8 = name in FLOAT8 and _dtypes._float8_carrier(tensor.dtype) is not None
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
    monkeypatch.setattr(_dtypes, "_float8_carrier", lambda dtype: None)
    with contextlib.suppress(
        RuntimeError
    ):  # an older torch: float8 types are not supported by dlpack
        assert shares(t2j(tensor), tensor)
    monkeypatch.setattr(_dtypes, "_float8_carrier", lambda dtype: torch.uint8)
    array = t2j(tensor)
    assert not shares(array, tensor)
    assert not shares(array, j2t(array))


@pytest.mark.parametrize("name", NAMES)
def test_j2t_shares_every_dtype(name: str) -> None:
    with precision(True):
        array = jnp.asarray(numpy_values(name))
        tensor = j2t(array)
    by_uint8 = name in FLOAT8 and _dtypes._float8_carrier(tensor.dtype) is not None
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


# --- refusals ------------------------------------------------------------------------------------


class Wrapper(torch.Tensor):
    """A tensor without memory, around another: what DTensor and torchao's quantized tensors are."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> torch.Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


def fake(*shape: int) -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(shape)


REFUSED: dict[str, tuple[type[Torch2JaxError], Callable[[], Any], str]] = {
    "float": (SignatureError, lambda: 1.0, r"takes a torch\.Tensor, got float\. jnp\.asarray"),
    "None": (SignatureError, lambda: None, "got NoneType"),
    "numpy": (SignatureError, lambda: np.ones(3), r"got numpy\.ndarray\. jnp\.asarray"),
    "array": (SignatureError, lambda: jnp.ones(3), "JAX array already; j2t"),
    "list": (SignatureError, lambda: [torch.ones(3)], "got list.*tree_t2j"),
    "coo": (
        SignatureError,
        lambda: torch.eye(3).to_sparse(),
        r"layout torch\.sparse_coo.*to_dense",
    ),
    "csr": (
        SignatureError,
        lambda: torch.eye(3).to_sparse_csr(),
        r"layout torch\.sparse_csr.*to_dense",
    ),
    "nested": (
        SignatureError,
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "nested.*padded",
    ),
    "jagged": (
        SignatureError,
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "nested.*padded",
    ),
    "meta": (SignatureError, lambda: torch.ones(3, device="meta"), "meta tensor.*zeros_like"),
    "empty meta": (SignatureError, lambda: torch.ones(0, device="meta"), "meta tensor"),
    "fake": (SignatureError, lambda: fake(3), "fake tensor.*traces"),
    "empty fake": (SignatureError, lambda: fake(0), "fake tensor.*traces"),
    "fake parameter": (SignatureError, lambda: torch.nn.Parameter(fake(3)), "fake tensor.*traces"),
    "wrapper": (SignatureError, lambda: Wrapper(torch.ones(3)), "Wrapper that holds no memory"),
    "lazy parameter": (
        SignatureError,
        torch.nn.parameter.UninitializedParameter,
        "not initialized.*lazy module",
    ),
    "quantized": (
        UnsupportedDtypeError,
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        r"torch\.qint8.*dequantize",
    ),
    "complex32": (
        UnsupportedDtypeError,
        lambda: torch.zeros(3, dtype=torch.complex32),
        r"torch\.complex32.*Supported",
    ),
    "module": (SignatureError, lambda: torch.nn.Linear(2, 2), "Linear.*from_module"),
    "function": (SignatureError, lambda: torch.sin, r"torch2jax\(fn\)"),
    "dtype": (SignatureError, lambda: torch.float32, "dtype_t2j"),
}


@pytest.mark.parametrize("label", REFUSED)
def test_t2j_refuses(label: str) -> None:
    error, make, words = REFUSED[label]
    value = quietly(make)
    with pytest.raises(error, match=words):
        t2j(value)


@pytest.mark.parametrize(
    ("value", "words"),
    [(jnp.sin, r"jax2torch\(fn\)"), (jnp.float32, "dtype_j2t"), (np.dtype("int8"), "dtype_j2t")],
    ids=["function", "scalar_type", "dtype"],
)
def test_j2t_says_what_converts_the_rest(value: Any, words: str) -> None:
    with pytest.raises(SignatureError, match=words):
        j2t(value)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "nested"])
def test_t2j_refuses_tensors_of_torch_func(transform: str) -> None:
    func, x = torch.func, torch.ones(3, 2)

    def convert(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(SignatureError, match=r"inside a torch\.func transform.*jax2torch"):
            t2j(x)
        return x.sum()

    run = {
        "vmap": lambda: func.vmap(convert)(x),
        "grad": lambda: func.grad(convert)(x),
        "jvp": lambda: func.jvp(convert, (x,), (x,)),
        "nested": lambda: func.vmap(func.grad(convert))(x),
    }
    quietly(run[transform])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: 1.0, r"takes a jax\.Array or a NumPy array, got float\. torch\.tensor"),
        (lambda: np.float32(1), r"got numpy\.float32"),
        (lambda: torch.ones(3), "tensor already; t2j"),
        (lambda: jax.ShapeDtypeStruct((3,), jnp.float32), "ShapeDtypeStruct"),
        (lambda: [jnp.ones(3)], "got list.*tree_j2t"),
    ],
    ids=["float", "numpy scalar", "tensor", "ShapeDtypeStruct", "list"],
)
def test_j2t_refuses(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(SignatureError, match=words):
        j2t(make())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: jax.random.key(0), r"key<fry>.*key_data"),
        (lambda: jnp.zeros(3, jnp.int4), "int4"),
        (lambda: np.zeros(3, jax.dtypes.float0), "float0"),
        (lambda: np.array(["a"]), "U1"),
    ],
    ids=["key", "int4", "float0", "strings"],
)
def test_j2t_refuses_dtypes(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UnsupportedDtypeError, match=words):
        j2t(make())


@pytest.mark.parametrize(
    "transform", [jax.jit, jax.grad, jax.vmap, jax.make_jaxpr, lambda f: jax.jit(jax.vmap(f))]
)
def test_j2t_refuses_tracers(transform: Callable[..., Any]) -> None:
    def convert(x: jax.Array) -> jax.Array:
        with pytest.raises(SignatureError, match=r"tracer, .*float32.*torch2jax\(fn\)"):
            j2t(x)
        return x.sum()

    transform(convert)(jnp.ones(()) if transform is jax.grad else jnp.ones((3, 2)))


def test_j2t_refuses_deleted_arrays() -> None:
    array = jnp.ones((3, 2))
    jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    with pytest.raises(Torch2JaxError, match=r"float32\[3,2\].*deleted.*donate_argnums.*jnp\.copy"):
        j2t(array)


SEVERAL_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, torch
from torch2jax import SignatureError, j2t, t2j, tree_j2t
devices = jax.devices()
assert len(devices) == 2
mesh = jax.sharding.Mesh(np.array(devices), "x")
for spec, where in (("x",), "sharded"), ((), "replicated"):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    array = jax.device_put(jnp.arange(4.), sharding)
    try:
        tree_j2t({where: array})
    except SignatureError as error:
        message = str(error)
    start = f"['{where}']: j2t got an array, float32[4]"
    for words in start, "2 devices", "jax.device_put", "addressable_shards":
        assert words in message, message
    assert j2t(jax.device_put(array, devices[1])).tolist() == [0, 1, 2, 3]
    assert j2t(array.addressable_shards[1].data).tolist() == ([2, 3] if spec else [0, 1, 2, 3])
assert t2j(torch.ones(2)).devices() == {devices[0]}
"""


def test_j2t_refuses_arrays_over_several_devices() -> None:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    subprocess.run(
        [sys.executable, "-W", "error", "-c", SEVERAL_DEVICES],
        check=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        timeout=120,
    )


# --- trees ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    a: Any
    b: Any


def test_trees_keep_their_structure_and_their_other_leaves() -> None:
    marker, array, numpy_array = object(), jnp.zeros(2), np.zeros(2)
    tree = {
        "t": torch.ones(2),
        "n": [1, 2.5, "s", True, marker, None],
        "p": Pair(torch.zeros(()), (torch.ones(3),)),
    }
    result = tree_t2j({**tree, "a": array, "np": numpy_array})
    assert result["a"] is array
    assert result["np"] is numpy_array
    assert result["n"] == tree["n"]
    assert result["n"][4] is marker
    assert isinstance(result["p"], Pair)
    assert all(isinstance(x, jax.Array) for x in (result["t"], result["p"].a, result["p"].b[0]))
    back = tree_j2t(result)
    assert back["n"] == tree["n"]
    assert torch.equal(back["p"].b[0], tree["p"].b[0])
    assert isinstance(back["a"], torch.Tensor)
    assert isinstance(back["np"], torch.Tensor)
    assert shares(result["t"], tree["t"])
    assert back["t"].data_ptr() == tree["t"].data_ptr()


@pytest.mark.parametrize(
    "leaf", [None, 3, "s", np.float32(1), torch.float32, torch.Size([2])], ids=repr
)
def test_a_tree_of_one_leaf_that_is_no_array(leaf: Any) -> None:
    assert tree_t2j(leaf) is leaf
    assert tree_j2t(leaf) is leaf


def test_a_state_dict_there_and_back() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()
    with precision(True):
        arrays = tree_t2j(state)
    assert type(arrays) is OrderedDict
    assert list(arrays) == list(state)
    assert all(shares(arrays[name], tensor) for name, tensor in state.items())
    twin = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    twin.load_state_dict(tree_j2t(arrays))
    assert all(
        torch.equal(a, b) for a, b in zip(state.values(), twin.state_dict().values(), strict=True)
    )
    with precision(False):
        assert tree_t2j(state)["1.num_batches_tracked"].dtype == np.int32


def test_errors_in_a_tree_name_the_leaf() -> None:
    with (
        precision(False),
        pytest.raises(UnsupportedDtypeError, match=r"^\['a'\]\[1\]: t2j got .*float64"),
    ):
        tree_t2j({"a": [torch.ones(2), torch.ones(2, dtype=torch.float64)]})
    with pytest.raises(SignatureError, match=r"^t2j got .*meta"):
        tree_t2j(torch.ones(2, device="meta"))
    deleted = jnp.ones(3)
    deleted.delete()
    with pytest.raises(Torch2JaxError, match=r"^\['b'\]: j2t got .*deleted"):
        tree_j2t({"a": jnp.ones(3), "b": deleted})


# --- the rest ------------------------------------------------------------------------------------


def test_examples_in_docstrings_run() -> None:
    with precision(False):
        examples = {"jnp": jnp}
        results = [doctest.testmod(m, extraglobs=examples) for m in (_convert, _dtypes)]
    assert sum(result.attempted for result in results) >= 14
    assert not any(result.failed for result in results)


def test_errors_are_what_the_contract_says() -> None:
    bases = {
        "SignatureError": TypeError,
        "UnsupportedDtypeError": TypeError,
        "DifferentiationError": TypeError,
        "TorchCallError": RuntimeError,
    }
    for name, base in bases.items():
        error = getattr(torch2jax, name)
        assert error.__mro__[1:3] == (Torch2JaxError, base)
        assert error.__doc__


def gpu_on_both_sides() -> bool:
    try:
        return torch.cuda.is_available() and bool(jax.devices("gpu"))
    except RuntimeError:
        return False


@pytest.mark.skipif(not gpu_on_both_sides(), reason="needs a GPU that both torch and jax have")
def test_gpu_memory_is_shared_and_pinned_memory_copied() -> None:
    tensor = numbered(64).cuda()
    array = t2j(tensor)
    assert shares(array, tensor)
    assert array.devices() == {jax.devices("gpu")[0]}
    assert j2t(array).data_ptr() == tensor.data_ptr()
    assert shares(t2j(tensor[1:]), tensor[1:])
    np.testing.assert_array_equal(t2j(numbered(4, 6).cuda().T), numbered(4, 6).T)
    with precision(False):
        assert t2j(torch.tensor([2**32 + 1]).cuda()).tolist() == [1]
    pinned = numbered(64).pin_memory()
    assert not shares(t2j(pinned), pinned)
    assert t2j(pinned).devices() == {jax.devices("cpu")[0]}
