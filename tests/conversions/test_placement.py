"""On which of JAX's devices the arrays of tensors are, and which of them they bind."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conversion_values import NAMES, NEEDS_X64, torch_values
from harness import precision
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import torch2jax
from torch2jax import Torch2JaxError, from_module, j2t, jax2torch, t2j
from torch2jax._compat import jax as compat
from torch2jax._conversions import convert


@pytest.fixture(autouse=True, scope="module")
def _device_jax() -> None:
    torch2jax.device.enable()


def tensor() -> torch.Tensor:
    return torch.arange(64.0).reshape(8, 8)


def module() -> torch.nn.Module:
    return torch.nn.Linear(8, 8)


def lowered_weights() -> jax.Array:
    return from_module(module(), lower=True)[1]["params"]["weight"]


MADE: dict[str, Callable[[], jax.Array]] = {
    "t2j": lambda: t2j(tensor()),
    "t2j of a slice": lambda: t2j(torch.arange(100.0)[1:65].view(8, 8)),
    "t2j of bfloat16": lambda: t2j(tensor().bfloat16()),
    "t2j of float8": lambda: t2j(tensor().to(torch.float8_e5m2)),
    "from_module": lambda: from_module(module())[1]["params"]["weight"],
    "from_module(lower=True)": lowered_weights,
    "tensor.to": lambda: tensor().to("jax").jax(),
    "module.to": lambda: module().to("jax").weight.jax(),
    "torch.tensor": lambda: torch.tensor([[1.0] * 8] * 8, device="jax").jax(),
    "torch.ones": lambda: torch.ones(8, 8, device="jax").jax(),
    "copy_": lambda: torch.zeros(8, 8, device="jax").copy_(tensor()).jax(),
    "device.tensor": lambda: torch2jax.device.tensor(t2j(tensor())).jax(),
}
"""All ways from a tensor on a CPU to an array."""


@pytest.mark.parametrize("way", MADE)
def test_arrays_are_on_the_default_device_and_bound_to_none(way: str) -> None:
    """As an array of `jnp.asarray`, they follow the weights beside which they stand."""
    first, second = jax.devices()[:2]
    assert MADE[way]().devices() == {first}
    with jax.default_device(second):
        array = MADE[way]()
        assert array.devices() == {second}
    weights = jax.device_put(jnp.ones((8, 8), array.dtype), jax.devices()[2])
    for x in (array, MADE[way]()):
        assert not x.committed
        out = jax.jit(lambda a, b: a.astype(jnp.float32) @ b.astype(jnp.float32))(x, weights)
        assert out.devices() == weights.devices()
        x = np.asarray(x).astype(np.float32)
        np.testing.assert_allclose(out, x @ np.ones((8, 8)), rtol=1e-5)


@pytest.mark.parametrize("way", MADE)
def test_arrays_join_others_on_a_mesh(way: str) -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    rows = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P("d")))
    out = jax.jit(lambda a, b: a.astype(jnp.float32) + b)(MADE[way](), rows)
    assert out.devices() == set(mesh.devices.flat)


@pytest.mark.parametrize("name", ["default_device", "update", "platform"])
def test_each_way_to_choose_the_default_device(name: str) -> None:
    third = jax.devices()[2]
    if name == "default_device":
        with jax.default_device(third):
            assert t2j(tensor()).devices() == jnp.ones(3).devices() == {third}
        return
    jax.config.update("jax_default_device", third if name == "update" else "cpu")
    try:
        assert t2j(tensor()).devices() == jnp.ones(3).devices()
    finally:
        jax.config.update("jax_default_device", None)


def test_memory_is_shared_with_any_device_of_the_cpu() -> None:
    x = tensor()
    for device in jax.devices():
        with jax.default_device(device):
            array = t2j(x)
        assert array.devices() == {device}
        assert array.unsafe_buffer_pointer() == x.data_ptr() == j2t(array).data_ptr()


def test_an_array_that_only_jax_holds_keeps_the_memory() -> None:
    x = torch.full((1000,), 7.0)
    array = t2j(x)
    del x
    kept = [torch.zeros(1000) for _ in range(20)]  # it would lie where x was
    np.testing.assert_array_equal(array, np.full(1000, 7.0))
    assert len(kept) == 20
    donated = jax.jit(lambda a: a + 1, donate_argnums=0)
    np.testing.assert_array_equal(donated(t2j(torch.full((1000,), 1.0))), np.full(1000, 2.0))


# --- where the default device is no CPU ----------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX's default device seems to be a GPU; what is copied there comes to the CPU."""
    monkeypatch.setattr(convert, "default_device", lambda: SimpleNamespace(platform="gpu"))


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_the_cpu_goes_where_jax_computes(name: str, x64: bool) -> None:
    if name in NEEDS_X64 and not x64:
        return
    with precision(x64):
        x = torch_values(name)
        array = t2j(x)
        assert array.dtype == torch2jax.dtype_t2j(x.dtype) or name == "int64"
        assert not array.committed
        assert array.unsafe_buffer_pointer() != x.data_ptr()
        before = np.asarray(array).tobytes()
        assert before == np.asarray(j2t(array).clone().view(torch.uint8)).tobytes()
        x.view(torch.uint8).zero_()  # the array has its own memory
        assert np.asarray(array).tobytes() == before


@pytest.mark.usefixtures("elsewhere")
def test_jax2torch_stays_where_its_tensors_are() -> None:
    x = tensor()
    seen = []
    f = jax2torch(lambda x: seen.append(1) or jnp.sin(x))
    torch.testing.assert_close(f(x), torch.sin(x))
    torch.testing.assert_close(f(x[:, 1:]), torch.sin(x[:, 1:]))
    compiled = torch.compile(torch.sin, backend="torch2jax")
    assert compiled(x).device.type == "cpu"


# --- devices by the numbers of the driver --------------------------------------------------------


@pytest.fixture
def second_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """This process has one GPU, the second one of the machine: `local_device_ids=[1]`.

    It has no CPU, as with `JAX_PLATFORMS=cuda`.
    """
    device = SimpleNamespace(id=5, local_hardware_id=1, platform="gpu", client=None)

    def local_devices(*_: Any, backend: str | None = None, **__: Any) -> list[Any]:
        if backend not in (None, "cuda", "gpu"):
            raise RuntimeError(f"Unknown backend {backend}")
        return [device]

    cached = (compat.cpu_device, compat.local_device)
    for function in cached:
        function.cache_clear()
    monkeypatch.setattr(jax, "local_devices", local_devices)
    yield device
    for function in cached:
        function.cache_clear()


def test_gpus_are_found_by_the_number_of_the_driver(second_gpu: Any) -> None:
    from torch2jax._jax2torch.function import _jax_device

    assert compat.local_device("cuda", 1) is second_gpu
    assert _jax_device(torch.device("cuda:1")) is second_gpu
    with pytest.raises(Torch2JaxError, match=r"JAX has no device cuda:0 here, but gpu:1"):
        _jax_device(torch.device("cuda:0"))


def test_stand_ins_are_on_the_gpu_of_this_process(
    second_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that the function closes over are there, and a stand-in beside them has to be."""
    from torch2jax._bridge.calls import planning

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(planning, "jax_default_device", lambda: second_gpu)
    assert planning.default_device() == torch.device("cuda:1")


def test_without_a_cpu_jax2torch_says_how_to_get_one(second_gpu: Any) -> None:
    f = jax2torch(jnp.sin)
    for call in (lambda: f(torch.ones(3)), lambda: f(2.0)):
        with pytest.raises(Torch2JaxError, match='JAX_PLATFORMS="cuda,cpu"'):
            call()
