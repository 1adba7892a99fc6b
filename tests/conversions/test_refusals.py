"""t2j and j2t: every refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conversion_values import quietly
from torch._subclasses.fake_tensor import FakeTensorMode

from torch2jax import SignatureError, Torch2JaxError, UnsupportedDtypeError, j2t, t2j


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
