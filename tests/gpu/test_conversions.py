"""Tensors of a GPU become arrays and back: by the device's number, aligned, with one event a call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import fake_xla
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from call_frames import FrameError
from fake_gpu import entry
from raw_calls import setup

from torch2jax import Torch2JaxError, from_module, jax2torch, t2j, torch2jax
from torch2jax._compat import jax as compat
from torch2jax._jax2torch import transfer
from torch2jax._refusals import on_one_of_several


def _forget_devices() -> None:
    for function in (compat.cpu_device, compat.local_device):
        function.cache_clear()


@pytest.fixture(params=[True, False], ids=["cuda,cpu", "cuda"])
def xla(gpu: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """JAX with both GPUs; by JAX_PLATFORMS=cuda without a CPU, too."""
    _forget_devices()
    yield gpu and fake_xla.install(monkeypatch, gpu, (0, 1), request.param)
    _forget_devices()


@pytest.fixture
def second(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """JAX in the second process of two, with a GPU each: local_device_ids=[1]."""
    _forget_devices()
    yield gpu and fake_xla.install(monkeypatch, gpu, (1,), cpu=True)
    _forget_devices()


# --- t2j -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", range(9))
def test_t2j_shares_memory_that_xla_takes(gpu: Any, xla: Any, start: int) -> None:
    """XLA ends a program with an error whose operand is not aligned to 16 bytes."""
    x = gpu.tensor(torch.arange(64.0))
    array = t2j(x[start:])
    np.testing.assert_array_equal(array, np.arange(64.0)[start:])
    ((address, number, _),) = xla.imports
    assert address % 16 == 0
    assert number == 0
    assert (address == x[start:].data_ptr()) == (start % 4 == 0)


def test_t2j_of_a_cpu_tensor_goes_to_the_gpu(gpu: Any, xla: Any) -> None:
    """The CPU of a machine with a GPU holds what JAX is to compute with on the GPU."""
    x = torch.arange(4.0)
    array = t2j(x)
    assert array.unsafe_buffer_pointer() != x.data_ptr()
    np.testing.assert_array_equal(array, np.arange(4.0))
    assert not array.committed
    weight = from_module(torch.nn.Linear(2, 2))[1]["params"]["weight"]
    assert not weight.committed


def test_devices_by_the_number_of_the_driver(gpu: Any, second: Any) -> None:
    t2j(gpu.tensor([1.0], device=1))
    assert second.imports[0][1] == 1
    with pytest.raises(Torch2JaxError, match=r"cuda:0, and JAX has no such device here, .* GPU 1"):
        t2j(gpu.tensor([1.0], device=0))
    f = jax2torch(jnp.sin)
    x = gpu.tensor([1.0, 2.0], device=1)
    torch.testing.assert_close(gpu.host(f(x)), torch.sin(torch.tensor([1.0, 2.0])))
    assert second.imports[1][1] == 1
    with pytest.raises(Torch2JaxError, match=r"args\[0\] of sin: .*no such device"):
        f(gpu.tensor([1.0], device=0))


# --- jax2torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("capsules", [False, True], ids=["exchange-api", "capsules"])
def test_one_event_orders_all_tensors_of_a_call(
    gpu: Any, xla: Any, capsules: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a plain tensor went by way of Python")

    monkeypatch.setattr(transfer, "_array", never)
    monkeypatch.setattr(transfer, "j2t", never)
    setup(force_capsules=capsules)
    try:
        f = jax2torch(lambda *xs: (sum(xs), *xs[:3]))
        side = gpu.stream()
        with gpu.on_stream(side):
            xs = [gpu.tensor(torch.full((4,), float(i))) for i in range(8)]
            f(*xs)
            for x in xs:
                x.add_(1)  # queued, not done, when XLA gets it
            gpu.reset()
            xla.imports.clear(), xla.exports.clear()
            outs = f(*xs)
            assert gpu.count("cuEventRecord") == gpu.count("cuStreamWaitEvent") == 1
            assert gpu.count("cuEventCreate") == gpu.context_managers == 0
        assert [address for address, _, _ in xla.imports] == [x.data_ptr() for x in xs]
        assert xla.exports == [side] * 4
        assert gpu.synchronizations == 0
    finally:
        setup()
    torch.testing.assert_close(gpu.host(outs[0]), torch.full((4,), 36.0))
    assert gpu.races() == []


def test_calls_on_another_device_than_the_current_one(gpu: Any, xla: Any) -> None:
    f = jax2torch(lambda x, y: x * y)
    assert gpu.driver.fake_device() == 0
    x = gpu.tensor([1.0, 2.0], device=1)
    f(x, x)
    assert {number for _, number, _ in xla.imports} == {1}
    assert gpu.driver.fake_device() == 0


def test_jax2torch_forward_and_backward(gpu: Any, xla: Any) -> None:
    """By tensors of the GPU alone; also where JAX has no CPU."""
    f = jax2torch(lambda x, w: jnp.sin(x) @ w)
    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(3.0)
    x, w = (gpu.tensor(v).requires_grad_() for v in (a, b))
    y = f(x, w)
    y.sum().backward()
    assert y.is_cuda
    p, q = a.clone().requires_grad_(), b.clone().requires_grad_()
    (torch.sin(p) @ q).sum().backward()
    torch.testing.assert_close(gpu.host(y.detach()), torch.sin(a) @ b)
    torch.testing.assert_close(gpu.host(x.grad), p.grad)
    torch.testing.assert_close(gpu.host(w.grad), q.grad)


def test_results_go_back_to_xla_in_the_order_of_streams(gpu: Any, xla: Any) -> None:
    """XLA would use the memory again while PyTorch still reads it."""
    made = entry(lambda x: (x + 1,), f"notes XLA's stream {id(xla)}")
    gpu.call(made.name, [gpu.buffer(np.ones(3, np.float32))], [gpu.empty((3,), np.float32)])
    f = jax2torch(jnp.sin)
    with gpu.on_stream(gpu.stream()):
        y = f(gpu.tensor([1.0]))
        gpu.reset()
        del y
        assert gpu.count("cuEventRecord") == gpu.count("cuStreamWaitEvent") == 1


def test_other_tensors_go_by_way_of_python(gpu: Any, xla: Any) -> None:
    """Transposed and unaligned ones are copied, on the device."""
    f = jax2torch(lambda x, y: x + y)
    x = gpu.tensor(torch.arange(16.0))
    out = f(x.view(4, 4).t(), x[1:5])
    a = torch.arange(16.0)
    torch.testing.assert_close(gpu.host(out) if out.is_cuda else out, a.view(4, 4).t() + a[1:5])
    assert all(address % 16 == 0 for address, _, _ in xla.imports)


def test_a_failing_driver_is_an_error(gpu: Any, xla: Any) -> None:
    f = jax2torch(jnp.sin)
    with gpu.on_stream(gpu.stream()):
        x = gpu.tensor([1.0])
        f(x)
        gpu.fail("cuEventRecord", code=700)
        with pytest.raises(RuntimeError, match="driver error 700"):
            f(x)
        torch.testing.assert_close(gpu.host(f(x)), torch.sin(torch.ones(1)))


def test_what_has_not_run_is_not_compiled_in_a_call(gpu: Any, xla: Any) -> None:
    """XLA's compiler would wait for the program that runs, and that one for the compiler."""
    sin = jax2torch(jnp.sin)

    def value(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (sin(x),)

    def gradient(x: torch.Tensor) -> tuple[torch.Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(sin(leaf).sum(), leaf)

    x, y = gpu.buffer(np.ones(3, np.float32)), gpu.empty((3,), np.float32)
    outside = gpu.tensor([1.0, 1.0, 1.0])
    for run, expected in ((value, np.sin(1.0)), (gradient, np.cos(1.0))):
        made = entry(run, f"compiles {run.__name__} {xla.imports}")
        with pytest.raises(FrameError, match=r"sin.* for the first time .* Call it once before"):
            gpu.call(made.name, [x], [y])
        run(outside)
        gpu.call(made.name, [x], [y])
        np.testing.assert_allclose(y.array, np.full(3, expected), rtol=1e-6)
    jax2torch(jnp.cos)(outside)  # outside of a call anything may be compiled


# --- threads and generators ----------------------------------------------------------------------


def test_jax_is_refused_on_the_thread_of_a_gpu(gpu: Any, xla: Any) -> None:
    """A program on several devices would deadlock there; the backward pass has its own thread."""
    seen: list[Any] = []

    class Pulls(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            with pytest.raises(Torch2JaxError, match="runs on several devices at once"):
                t2j(g)
            seen.append(threading.current_thread())
            return g * 2

    x = gpu.tensor([1.0, 2.0]).requires_grad_()
    on_one_of_several(lambda: Pulls.apply(x).sum().backward())()
    assert seen
    assert seen[0] is not threading.current_thread()
    torch.testing.assert_close(gpu.host(x.grad), torch.full((2,), 2.0))


def test_settings_reach_the_thread_of_a_gpu(gpu: Any, xla: Any) -> None:
    seen: list[Any] = []

    @jax.custom_vjp
    def fn(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    def backward(x: jax.Array, c: jax.Array) -> tuple[jax.Array]:
        precision = jax.config.jax_default_matmul_precision
        seen.append((threading.current_thread(), precision, jax.config.jax_enable_x64))
        return (jnp.cos(x) * c,)

    fn.defvjp(lambda x: (jnp.sin(x), x), backward)
    x = gpu.tensor([1.0, 2.0]).requires_grad_()
    with jax.default_matmul_precision("highest"), compat.precision(True):
        jax2torch(fn)(x).sum().backward()
    ((thread, precision, x64),) = seen
    assert thread is not threading.current_thread()
    assert (precision, x64) == ("highest", True)


def test_a_derivative_may_not_draw_on_the_gpu(gpu: Any) -> None:
    """output_shapes keeps drawing from being seen; the GPU's generator tells, as the CPU's does."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        mask = torch.rand(3, generator=torch.cuda.default_generators[0]) < 0.5
        return x * mask.to(x.device, x.dtype)

    f = torch2jax(fn, output_shapes=jax.ShapeDtypeStruct((3,), jnp.float32))
    gpu.run(f, jnp.ones(3))
    with pytest.raises(Exception, match="draws random numbers, and output_shapes= kept that"):
        gpu.run(jax.grad(lambda x: f(x).sum()), jnp.ones(3))
