"""dtype_t2j and dtype_j2t: every dtype, and those that only one side has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conversion_values import NAMES, numpy_dtype
from harness import precision

from torch2jax import SignatureError, UnsupportedDtypeError, dtype_j2t, dtype_t2j
from torch2jax._conversions import dtypes


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
            dtypes.canonical(getattr(torch, name))
            == jnp.asarray(np.zeros(3, numpy_dtype(name))).dtype
        )
        assert dtypes.x64_enabled() is x64


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
