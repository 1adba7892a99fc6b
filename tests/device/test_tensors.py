"""The PyTorch device "jax": the everyday surface, against the same program on the CPU."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import threading
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import close
from torch import nn

from torch2jax import Torch2JaxError, UnsupportedDtypeError, device
from torch2jax._lower.torch_compile import backend

device.enable()


# Each runs on the CPU and on the device; the results are compared.
PROGRAMS: dict[str, Any] = {
    "add in place to a row": lambda x: x[0].add_(1),
    "item assignment": lambda x: x.__setitem__(0, 5.0),
    "column": lambda x: x.__setitem__((slice(None), 1), torch.tensor([7.0, 8.0]).to(x.device)),
    "transposed": lambda x: x.t().add_(1),
    "chain": lambda x: x.t()[1:].view(-1)[::2].mul_(3) if x.t()[1:].is_contiguous() else x.add_(1),
    "slice of a slice": lambda x: x[:, 1:][0].fill_(2),
    "diagonal": lambda x: x.diagonal().zero_(),
    "unfold": lambda x: x.unfold(1, 2, 1)[:, 0].add_(1),
    "every window": lambda x: x.unfold(1, 2, 1).fill_(3),
    "one of windows": lambda x: x.unfold(1, 2, 1).view(torch.float32)[0, 0].neg_(),
    "window in bits": lambda x: x.unfold(1, 2, 1)[:, 0].view(torch.int32).zero_(),
    "one of expanded": lambda x: x.expand(2, 2, 3)[1].mul_(2),
    "all of expanded": lambda x: x[1].expand(4, 3).zero_(),
    "as_strided": lambda x: x.as_strided((3,), (2,), 0).add_(10),
    "split": lambda x: x.split(2, 1)[0].neg_(),
    "unbind": lambda x: x.unbind(1)[2].copy_(x.unbind(1)[0]),
    "chunk": lambda x: x.chunk(2, 0)[1].exp_(),
    "expand read": lambda x: x.add_(x[:1].clone().expand(2, 3)),
    "mask": lambda x: x.__setitem__(x > 2, 0.0),
    "mask with values": lambda x: x.__setitem__(x > 2, -x[x > 2]),
    "index_put": lambda x: x.__setitem__(torch.tensor([0, 1]), torch.tensor(9.0).to(x.device)),
    "masked_fill_": lambda x: x.masked_fill_(x > 1, -1),
    "out": lambda x: torch.add(x, 1, out=x),
    "out of no elements": lambda x: x.copy_(torch.add(x, 1, out=x.new_empty(0))),
    "outs": lambda x: x[:, :2].copy_(
        torch.topk(x, 2, out=(x.new_empty(0), x.new_empty(0, dtype=torch.int64)))[0]
    ),
    "narrow": lambda x: x.narrow(1, 1, 2).mul_(-1),
    "reshape": lambda x: x.reshape(3, 2)[1].mul_(-1),
    "out view": lambda x: torch.mul(x[0], 2, out=x[1]),
    "clamp_": lambda x: x.clamp_(1, 3),
    "unsqueeze": lambda x: x.unsqueeze(0).squeeze().flatten().add_(1),
    "movedim": lambda x: x.movedim(0, 1)[0].add_(5),
    "real": lambda x: torch.view_as_complex(x.view(3, 2)).mul_(1j),
    "dtype view": lambda x: x.view(torch.int32)[0].zero_(),
    "sub alpha": lambda x: x.sub_(x.clone(), alpha=0.5),
    "foreach": lambda x: torch._foreach_add_([x[0], x[1]], 2.0),
    "scatter_": lambda x: x.scatter_(1, torch.tensor([[0], [2]]).to(x.device), 4.0),
    "index_add_": lambda x: x.index_add_(0, torch.tensor([0, 0]).to(x.device), x.clone()),
    "sort": lambda x: x.copy_(x.sort(1, descending=True).values),
    "swap": lambda x: x.__setitem__([0, 1], x[[1, 0]]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_in_place_and_views(name: str) -> None:
    expected = torch.arange(6.0).reshape(2, 3)
    x = expected.to("jax")
    row = x[1]
    PROGRAMS[name](expected)
    PROGRAMS[name](x)
    close(x, expected)
    close(row, expected[1])
    assert x.stride() == expected.stride()


@pytest.mark.parametrize("name", PROGRAMS)
def test_in_place_and_views_in_inference_mode(name: str) -> None:
    with torch.inference_mode():
        test_in_place_and_views(name)


@pytest.mark.parametrize("name", PROGRAMS)
def test_in_place_and_views_under_jit(name: str) -> None:
    if name == "mask with values":
        pytest.skip("the number of selected values is not known when it is compiled")
    expected = torch.arange(6.0).reshape(2, 3)

    def run(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        PROGRAMS[name](y)
        return y

    compiled = device.jit(run)
    for _ in range(2):
        close(compiled(expected.to("jax")), run(expected))


VIEWS: dict[str, Any] = {
    "t": lambda x: x.t(),
    "select": lambda x: x[1],
    "slice": lambda x: x[:, 1::2],
    "permute": lambda x: x.view(3, 2, 2).permute(2, 0, 1),
    "expand": lambda x: x[:1].expand(5, 4),
    "diagonal": lambda x: x.diagonal(1),
    "unfold": lambda x: x.unfold(1, 2, 2),
    "newaxis": lambda x: x[:, None, 2],
}


@pytest.mark.parametrize("name", VIEWS)
def test_sizes_strides_and_offsets(name: str) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    expected, got = VIEWS[name](base), VIEWS[name](base.to("jax"))
    assert got.shape == expected.shape
    assert got.stride() == expected.stride()
    assert got.storage_offset() == expected.storage_offset()
    assert got.is_contiguous() == expected.is_contiguous()
    close(got, expected)


def test_factories_and_moves() -> None:
    assert torch.randn(3, device="jax").device == torch.device("jax", 0)
    for make in (
        lambda d: torch.ones(2, 3, device=d),
        lambda d: torch.arange(1, 7, 2, device=d),
        lambda d: torch.full((2,), 3, device=d),
        lambda d: torch.eye(3, device=d),
        lambda d: torch.linspace(0, 1, 5, device=d),
        lambda d: torch.tensor([[1, 2], [3, 4]], device=d),
        lambda d: torch.zeros_like(torch.ones(3, device=d), dtype=torch.int32),
        lambda d: torch.ones(3, device=d).new_full((2,), 5),
        lambda d: torch.tril_indices(3, 3, device=d),
        lambda d: torch.as_tensor(np.ones(3), dtype=torch.float32, device=d),
        lambda d: torch.hann_window(5, device=d),
        lambda d: torch.fft.fftfreq(4, device=d),
        lambda d: torch.fft.fftfreq(5, 0.3, device=d),
        lambda d: torch.fft.rfftfreq(5, 0.3, device=d),
        lambda d: torch.bartlett_window(5, device=d),
        lambda d: torch.kaiser_window(5, device=d),
        lambda d: torch.kaiser_window(4, periodic=False, beta=3.0, device=d),
    ):
        expected, got = make("cpu"), make("jax")
        assert isinstance(got, device.Tensor)
        assert got.dtype is expected.dtype
        close(got, expected)
    with torch.device("jax"):
        x = torch.randn(3)
    assert x.device.type == "jax"
    assert x.cpu().device.type == "cpu"
    assert x.to("cpu").device.type == "cpu"
    assert x.to("jax") is x
    assert x.to(torch.float16).dtype is torch.float16
    assert torch.zeros_like(x, device="cpu").device.type == "cpu"
    close(torch.ones(2).to(x), torch.ones(2))


def test_the_default_dtype_selects_a_program() -> None:
    number, whole = torch.full((1,), 2, device="jax"), torch.ones(1, dtype=torch.int32).to("jax")
    makes: list[Any] = [lambda: torch.full((1,), 0.5, device="jax"), lambda: whole / number]
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            torch.set_default_dtype(dtype)
            for make in makes:
                assert make().dtype is dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_out_of_another_shape_is_resized() -> None:
    x, out = torch.ones(2, 3, device="jax"), torch.ones(5, device="jax")
    with pytest.warns(UserWarning, match="An output with one or more elements was resized"):
        torch.add(x, 1, out=out)
    close(out, torch.full((2, 3), 2.0))
    assert out.stride() == (3, 1)


def test_values() -> None:
    x = torch.tensor([[1.5, 2.5]], device="jax")
    assert x.tolist() == [[1.5, 2.5]]
    assert x.numpy().tolist() == [[1.5, 2.5]]
    assert np.asarray(x).shape == (1, 2)
    assert x[0, 1].item() == 2.5
    assert float(x[0, 0]) == 1.5
    assert bool((x > 0).all())
    assert [10, 20, 30][torch.tensor(1, device="jax")] == 20
    assert len(x) == 1
    assert torch.equal(x, x.clone())
    assert torch.allclose(x, x + 1e-9)
    assert repr(x) == "tensor([[1.5000, 2.5000]], device='jax:0')"
    assert f"{x[0, 0]:.1f}" == "1.5"
    assert torch.from_dlpack(x).tolist() == [[1.5, 2.5]]
    assert x.nonzero().tolist() == [[0, 0], [0, 1]]
    assert x[x > 2].tolist() == [2.5]
    assert torch.tensor(3, device="jax").dtype is torch.int64


def test_no_copy_between_arrays_and_tensors() -> None:
    a = jnp.arange(4.0)
    t = device.tensor(a)
    assert t.jax() is a
    t.add_(1)
    assert a[0] == 0
    assert t.jax()[0] == 1


def test_dtypes_without_x64() -> None:
    x = torch.arange(3, device="jax")
    assert x.dtype is torch.int64
    assert x.jax().dtype == jnp.int32
    assert (x + torch.ones(3, dtype=torch.int32, device="jax")).dtype is torch.int64
    ints = torch.ones(3, dtype=torch.int32, device="jax")
    assert (ints * 2).dtype is torch.int32
    assert ints.sum().dtype is torch.int64
    assert (ints / 2).dtype is torch.float32
    assert x.cpu().dtype is torch.int64
    with pytest.raises(UnsupportedDtypeError, match="int32"):
        torch.tensor([2**40]).to("jax")


def test_devices_do_not_mix() -> None:
    x = torch.ones(3, device="jax")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    close(x + torch.tensor(2.0), torch.full((3,), 3.0))


def pair() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    cpu = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(0.0), nn.Linear(8, 2)
    )
    ours = copy.deepcopy(cpu).to("jax")
    return cpu, ours, torch.randn(6, 4)


def test_module_to_and_back() -> None:
    _, ours, x = pair()
    assert all(isinstance(p, nn.Parameter) for p in ours.parameters())
    assert all(p.device.type == "jax" for p in ours.parameters())
    ours.to(torch.bfloat16)
    assert ours(x.to("jax", torch.bfloat16)).dtype is torch.bfloat16
    assert ours[0].weight.jax().dtype == jnp.bfloat16
    ours.float().cpu()
    assert ours[0].weight.device.type == "cpu"
    assert type(ours[0].weight) is nn.Parameter


def test_backward_and_autograd_grad() -> None:
    cpu, ours, x = pair()
    expected, got = cpu(x), ours(x.to("jax"))
    close(got, expected)
    expected.square().sum().backward()
    got.square().sum().backward()
    for p, q in zip(ours.parameters(), cpu.parameters(), strict=True):
        close(p.grad, q.grad, 1e-4)
    for p, q in zip(ours.buffers(), cpu.buffers(), strict=True):
        close(p, q)
    y = torch.ones(3, device="jax", requires_grad=True)
    (g,) = torch.autograd.grad((y**3).sum(), y, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), y)
    assert h.tolist() == [6.0, 6.0, 6.0]
    w = (y * 1).exp()
    w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        w.sum().backward()


def test_gradients_across_devices() -> None:
    x = torch.ones(3, requires_grad=True)
    (x.to("jax") * 2).sum().cpu().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("foreach", [None, False, True])
def test_clipping(foreach: bool | None) -> None:
    values = (torch.tensor([3.0, -4.0]), torch.tensor([[12.0]]))
    for clip in (torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_):
        results = []
        for place in ("jax", "cpu"):
            parameters = [nn.Parameter(torch.ones_like(x, device=place)) for x in values]
            for p, x in zip(parameters, values, strict=True):
                p.grad = x.to(place).clone()
            results.append([clip(parameters, 6.5, foreach=foreach), *[p.grad for p in parameters]])
        for ours, theirs in zip(*results, strict=True):
            if theirs is not None:
                close(ours, theirs)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adam, {"lr": 0.1}),
        (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
        (torch.optim.RMSprop, {"lr": 0.01}),
        (torch.optim.Adagrad, {"lr": 0.1}),
    ],
)
def test_optimizers(make: Any, options: Any, foreach: bool) -> None:
    cpu, ours, x = pair()
    for module, data in ((cpu, x), (ours, x.to("jax"))):
        optimizer = make(module.parameters(), **options, foreach=foreach)
        for _ in range(3):
            optimizer.zero_grad()
            module(data).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
    for p, q in zip(ours.parameters(), cpu.parameters(), strict=True):
        close(p, q, 1e-3)


def test_state_dict_and_pickles() -> None:
    cpu, ours, _ = pair()
    ours.load_state_dict(cpu.state_dict())
    assert ours[0].weight.device.type == "jax"
    cpu.load_state_dict(ours.state_dict())
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert state["0.weight"].device.type == "cpu"
    close(state["0.weight"], cpu[0].weight)
    twin = copy.deepcopy(ours)
    assert isinstance(twin[0].weight, nn.Parameter)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert ours[0].weight.abs().sum() > 0


def test_load_to_the_device() -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    saved = {
        "w": nn.Parameter(tied),
        "again": tied,
        "t": torch.arange(6).reshape(2, 3).t(),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "none": torch.ones(0, 3),
        "number": torch.tensor(2.0),
    }
    file = io.BytesIO()
    torch.save(saved, file)
    for place in ("jax", "jax:0", torch.device("jax"), {"cpu": "jax"}):
        file.seek(0)
        found = torch.load(file, map_location=place)
        for name, x in saved.items():
            assert isinstance(found[name], device.Tensor)
            assert found[name].dtype is x.dtype
            close(found[name], x)
        assert isinstance(found["w"], nn.Parameter)
        assert found["w"].requires_grad
        found["again"].add_(1)
        close(found["w"], tied + 1)
    file.seek(0)
    with pytest.raises(RuntimeError, match="index 0 alone"):
        torch.load(file, map_location="jax:1")
    file.seek(0)
    assert torch.load(file)["w"].device.type == "cpu"


def test_load_of_a_module_and_of_old_files() -> None:
    cpu, _, x = pair()
    file = io.BytesIO()
    torch.save(cpu.eval(), file)
    file.seek(0)
    ours = torch.load(file, map_location="jax", weights_only=False)
    close(ours(x.to("jax")), cpu(x))
    file = io.BytesIO()
    torch.save({"x": x}, file, _use_new_zipfile_serialization=False)
    file.seek(0)
    with pytest.raises(Torch2JaxError, match='map_location="cpu"'):
        torch.load(file, map_location="jax")


def test_autocast() -> None:
    x = torch.randn(4, 4, device="jax")
    layer = nn.Linear(4, 4).to("jax")
    with torch.autocast("jax", torch.bfloat16):
        y = layer(x)
        z = torch.softmax(y, -1)
    assert y.dtype is torch.bfloat16
    assert z.dtype is torch.float32
    z.sum().backward()
    assert layer.weight.grad.dtype is torch.float32
    assert layer(x).dtype is torch.float32


def test_random_numbers() -> None:
    torch.manual_seed(3)
    a, b = torch.randn(4, device="jax"), torch.rand(4, device="jax")
    torch.manual_seed(3)
    assert torch.equal(a, torch.randn(4, device="jax"))
    assert torch.equal(b, torch.rand(4, device="jax"))
    state = torch.jax.get_rng_state()  # type: ignore[attr-defined]
    c = torch.randn(4, device="jax")
    torch.jax.set_rng_state(state)  # type: ignore[attr-defined]
    assert torch.equal(c, torch.randn(4, device="jax"))
    g = torch.Generator().manual_seed(1)
    d = torch.randn(4, device="jax", generator=g)
    g.manual_seed(1)
    assert torch.equal(d, torch.randn(4, device="jax", generator=g))
    x = torch.randn(10000, device="jax")
    assert abs(x.mean()) < 0.05
    assert abs(x.std() - 1) < 0.05
    y = torch.empty(1000, device="jax").uniform_(2, 3)
    assert 2 <= y.min() < y.max() <= 3
    assert torch.randperm(10, device="jax").sort().values.tolist() == list(range(10))
    drop = nn.Dropout(0.5)(torch.ones(1000, device="jax"))
    assert set(drop.unique().tolist()) == {0.0, 2.0}


def test_torch_func() -> None:
    x = torch.arange(3.0, device="jax")
    close(torch.func.grad(lambda x: (x**2).sum())(x), torch.tensor([0.0, 2.0, 4.0]))
    close(
        torch.func.vmap(lambda a: a * a.sum())(torch.ones(2, 3, device="jax")), torch.ones(2, 3) * 3
    )
    close(torch.func.jacrev(torch.sin)(x), torch.func.jacrev(torch.sin)(torch.arange(3.0)))


def test_data_loader() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(6.0).reshape(6, 1))
    for workers in (0, 1):
        loader = torch.utils.data.DataLoader(data, 2, num_workers=workers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = [x.to("jax").sum().item() for (x,) in loader]
        assert rows == [1.0, 5.0, 9.0]


def test_threads() -> None:
    results: list[float] = []

    def work(n: int) -> None:
        x = torch.full((3,), float(n), device="jax", requires_grad=True)
        (x * x).sum().backward()
        results.append(x.grad[0].item())

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(results) == [2.0 * n for n in range(8)]


def test_an_error_in_a_hook_reaches_the_caller() -> None:
    program = """
import torch, torch2jax
torch2jax.device.enable()
x = torch.ones(3, device="jax", requires_grad=True)
y = x * 2
def hook(g): raise ValueError("from the hook")
y.register_hook(hook)
try:
    y.sum().backward()
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "from the hook\n", done.stderr


def test_a_tensor_may_hold_a_tracer() -> None:
    @jax.jit
    def f(a: Any) -> Any:
        x = device.tensor(a)
        x[0] += 1
        return torch.softmax(x, 0).jax()

    np.testing.assert_allclose(f(jnp.zeros(2)), jax.nn.softmax(jnp.array([1.0, 0.0])), 1e-6)


def test_other_tensors_are_as_before() -> None:
    assert type(torch.ones(3)) is torch.Tensor
    assert torch.ones(3).pin_memory is not None
    assert not torch.jax.is_available()  # type: ignore[attr-defined]


# --- compiled ------------------------------------------------------------------------------------


def test_a_whole_training_step_is_one_program() -> None:
    cpu, ours, x = pair()

    def make(module: nn.Module, **options: Any) -> Any:
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1, **options)

        def step(x: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss = module(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    expected, got = make(cpu), device.jit(make(ours, capturable=True))
    data = x.to("jax")
    for _ in range(5):
        close(got(data), expected(x), 1e-4)
    for p, q in zip(ours.parameters(), cpu.parameters(), strict=True):
        close(p, q, 1e-3)
        close(p.grad, q.grad, 1e-3)
    close(ours[2].running_mean, cpu[2].running_mean, 1e-4)


def test_state_on_the_cpu_is_refused_when_compiled() -> None:
    _, ours, x = pair()
    optimizer = torch.optim.Adam(ours.parameters())  # its step count is on the CPU

    @device.jit
    def step(x: torch.Tensor) -> None:
        ours(x).sum().backward()
        optimizer.step()

    step(x.to("jax"))
    with pytest.raises(Exception, match="capturable"):
        step(x.to("jax"))


def test_a_compiled_module_is_a_module() -> None:
    cpu, ours, x = pair()
    compiled = device.jit(ours)
    assert isinstance(compiled, nn.Module)
    assert list(compiled.state_dict()) == list(cpu.state_dict())
    for _ in range(3):
        cpu.zero_grad()
        compiled.zero_grad()
        expected, got = cpu(x), compiled(x.to("jax"))
        expected.square().sum().backward()
        got.square().sum().backward()
        close(got, expected)
        for p, q in zip(compiled.parameters(), cpu.parameters(), strict=True):
            close(p.grad, q.grad, 1e-4)
    compiled.eval()
    cpu.eval()
    for _ in range(2):
        close(compiled(x.to("jax")), cpu(x))


def test_random_numbers_differ_between_compiled_calls() -> None:
    drop = device.jit(lambda x: torch.dropout(x, 0.5, True))
    x = torch.ones(100, device="jax")
    drop(x)
    assert not torch.equal(drop(x), drop(x))


def test_torch_compile() -> None:
    cpu, _, x = pair()
    twin = copy.deepcopy(cpu)
    compiled = torch.compile(twin, backend=backend)
    expected, got = cpu(x), compiled(x)
    close(got, expected)
    expected.square().sum().backward()
    got.square().sum().backward()
    for p, q in zip(twin.parameters(), cpu.parameters(), strict=True):
        close(p.grad, q.grad, 1e-4)


# --- interoperation ------------------------------------------------------------------------------


def test_call_jax_and_call_torch() -> None:
    x = torch.arange(3.0, device="jax", requires_grad=True)
    out = device.call_jax(lambda d, k: {"y": d["x"] ** 2 * k}, {"x": x}, 3)
    out["y"].sum().backward()
    assert x.grad.tolist() == [0.0, 6.0, 12.0]
    a = jnp.arange(3.0)
    np.testing.assert_allclose(device.call_torch(torch.exp, a), jnp.exp(a), 1e-6)
    grad = jax.jit(jax.grad(lambda a: device.call_torch(lambda t: (t**2).sum(), a)))(a)
    np.testing.assert_allclose(grad, 2 * a)


def test_views_and_value_and_grad() -> None:
    w = torch.ones(3, device="jax")
    assert device.jax_view([w])[0] is w.jax()
    value, grads = device.value_and_grad(lambda p: (p["w"] ** 3).sum())({"w": w})
    assert value.item() == 3
    assert grads["w"].tolist() == [3.0, 3.0, 3.0]
    sin = device.torch_view(jnp.sin)
    close(sin(w), torch.sin(torch.ones(3)))
    w.requires_grad_()
    device.checkpoint(lambda x: torch.sin(x) ** 2)(w).sum().backward()
    close(w.grad, torch.sin(2 * torch.ones(3)))


def test_extract() -> None:
    cpu, ours, x = pair()
    for module in (cpu.eval(), ours.eval()):
        state, fn = device.extract(module)
        out = jax.jit(fn)(state, (jnp.asarray(x.numpy()),))
        np.testing.assert_allclose(out, cpu(x).detach(), 1e-5, 1e-5)


# --- wrong input ---------------------------------------------------------------------------------


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "product": (lambda x: x @ x, RuntimeError, "cannot be multiplied"),
    "sum": (lambda x: x + torch.ones(2, device="jax"), RuntimeError, "must match"),
    "dimension": (lambda x: x.sum(5), IndexError, "Dimension out of range"),
    "index": (lambda x: x[7], IndexError, "out of bounds"),
    "view": (lambda x: x.view(4), RuntimeError, "invalid for input of size 6"),
    "windows": (lambda x: x.unfold(1, 2, 1).add_(1), RuntimeError, "single memory location"),
    "windows in bits": (
        lambda x: x.unfold(1, 2, 1).view(torch.int32)[0, 0].zero_(),
        RuntimeError,
        "single memory location",
    ),
    "expanded": (lambda x: x.expand(2, 2, 3).add_(1), RuntimeError, "single memory location"),
    "in place": (lambda x: x.int().add_(1.5), RuntimeError, "in-place ops|can't be cast"),
    "another device": (lambda x: torch.ones(2, device="jax:1"), RuntimeError, "index 0 alone"),
    "move": (lambda x: x.cpu().to("jax:1"), RuntimeError, "index 0 alone"),
    "move of ours": (lambda x: x.to("jax:1"), RuntimeError, "index 0 alone"),
    "array": (lambda x: device.tensor(x.numpy()), TypeError, "takes a jax.Array"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name: str) -> None:
    fn, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        fn(torch.ones(2, 3, device="jax"))


def test_zeros_of_both_signs_are_two_numbers() -> None:
    x = torch.ones(1, device="jax")
    for number in (0.0, -0.0, 0.0):
        expected = np.copysign(1, number)
        assert np.copysign(1, (x * number).item()) == expected
        assert np.copysign(1, torch.full((1,), number, device="jax").item()) == expected


def test_a_compiled_module_sees_new_parameters_and_autocast() -> None:
    layer = nn.Linear(3, 3).to("jax")
    compiled, x = device.jit(layer), torch.ones(1, 3, device="jax")
    for _ in range(2):
        compiled(x)
    for name in ("weight", "bias"):
        setattr(layer, name, nn.Parameter(torch.zeros_like(getattr(layer, name))))
    for _ in range(3):
        assert compiled(x).abs().sum() == 0
    for _ in range(3):
        with torch.autocast("jax", torch.bfloat16):
            assert compiled(x).dtype is torch.bfloat16
        assert compiled(x).dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_factories_of_another_device_take_values_from_ours(dtype: torch.dtype) -> None:
    start, end = torch.tensor(1.5), torch.tensor(9.0)
    for make in (torch.linspace, torch.logspace):
        ours = make(start.to("jax"), end.to("jax"), 5, dtype=dtype, device="cpu")
        assert ours.device.type == "cpu"
        assert torch.equal(ours, make(start, end, 5, dtype=dtype))
        torch.testing.assert_close(
            make(start.to("jax"), end, 5, dtype=dtype, device="jax").cpu(),
            make(start, end, 5, dtype=dtype),
        )
