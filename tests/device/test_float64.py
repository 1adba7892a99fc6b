"""Floats of 64 bits with x64 off: device "jax" carries them in 32 bits, and PyTorch's types hold.

Each program runs on the CPU in float64 and on device "jax", and gives the same dtypes.
"""

from __future__ import annotations

import copy
import io
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchdiffeq
from harness import close, default_dtype, precision
from torch import nn

from torch2jax import Torch2JaxError, Torch2JaxWarning, UnsupportedDtypeError, device
from torch2jax import torchax as tx

device.enable()
WIDE = "not available while 64-bit values are switched off"


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{WIDE}")
        yield


def single(x: Any) -> Any:
    return torch.tensor([0.5, 1.5, 2.5], device=x)


def double(x: Any) -> Any:
    return single(x).double()


def square(p: Any) -> Any:
    a = torch.arange(9.0, device=p).reshape(3, 3).sin() + 3 * torch.eye(3, device=p)
    return a.double()


def cplx(p: Any) -> Any:
    return torch.complex(double(p), -double(p))


PROGRAMS: dict[str, Any] = {
    # factories
    "arange": lambda p: torch.arange(3, dtype=torch.float64, device=p),
    "arange in steps": lambda p: torch.arange(0, 1, 0.25, dtype=torch.float64, device=p),
    "linspace": lambda p: torch.linspace(0, 1, 5, dtype=torch.float64, device=p),
    "logspace": lambda p: torch.logspace(0, 1, 5, dtype=torch.float64, device=p),
    "tensor": lambda p: torch.tensor([1.5, 2], dtype=torch.float64, device=p),
    "a Python number": lambda p: torch.tensor(1.5, dtype=torch.float64, device=p),
    "numpy": lambda p: torch.tensor(np.array([0.1, 0.2]), device=p),
    "as_tensor": lambda p: torch.as_tensor(np.array([0.1, 0.2]), device=p),
    "from_numpy": lambda p: torch.from_numpy(np.array([0.1, 0.2])).to(p),
    "full": lambda p: torch.full((2,), 1.5, dtype=torch.float64, device=p),
    "eye": lambda p: torch.eye(3, dtype=torch.float64, device=p),
    "zeros_like": lambda p: torch.zeros_like(single(p), dtype=torch.float64),
    "new_zeros": lambda p: single(p).new_zeros(2, dtype=torch.float64),
    "new_tensor": lambda p: double(p).new_tensor([1.0]),
    "window": lambda p: torch.hann_window(6, dtype=torch.float64, device=p),
    "complex128": lambda p: torch.ones(2, dtype=torch.complex128, device=p),
    # casts
    "double": double,
    "to a dtype": lambda p: single(p).to(torch.float64),
    "to a tensor": lambda p: single(p).to(double(p)),
    "type": lambda p: single(p).type(torch.float64),
    "of integers": lambda p: torch.arange(3, device=p).double(),
    "of a mask": lambda p: (single(p) > 1).double(),
    "to complex128": lambda p: single(p).to(torch.complex128),
    "back": lambda p: double(p).to(single(p).dtype),
    "checked and back": lambda p: (
        x.to(torch.float32) if (x := double(p)).dtype == torch.float64 else None
    ),
    # promotion
    "beside float32": lambda p: double(p) * single(p),
    "float32 beside a number": lambda p: single(p) * double(p)[0],
    "two numbers": lambda p: single(p)[0] * double(p)[0],
    "integers beside a number": lambda p: torch.arange(3, device=p) * double(p)[0],
    "beside bfloat16": lambda p: double(p) * single(p).bfloat16(),
    "a Python number beside": lambda p: double(p) * 2.5 + 1,
    "a CPU number beside": lambda p: single(p) * torch.tensor(2.0, dtype=torch.float64),
    "of two CPU numbers": lambda p: single(p)[0] * torch.tensor(2.0, dtype=torch.float64),
    "cat": lambda p: torch.cat([single(p), double(p)]),
    "where": lambda p: torch.where(single(p) > 1, single(p), double(p)),
    "comparison": lambda p: double(p) > single(p),
    "in place": lambda p: single(p).add_(double(p)),
    "in place of wide": lambda p: double(p).add_(single(p)),
    "item assignment": lambda p: (x := double(p), x.__setitem__(1, 7.5))[0],
    "rows assigned": lambda p: (x := square(p), x.__setitem__(1, double(p)))[0],
    "out": lambda p: torch.add(single(p), 1, out=double(p)),
    # operators with a dtype
    "sum": lambda p: single(p).sum(dtype=torch.float64),
    "mean": lambda p: single(p).mean(dtype=torch.float64),
    "cumsum": lambda p: single(p).cumsum(0, dtype=torch.float64),
    "prod": lambda p: single(p).prod(dtype=torch.float64),
    "softmax": lambda p: torch.softmax(single(p), 0, dtype=torch.float64),
    "norm": lambda p: torch.linalg.vector_norm(single(p), dtype=torch.float64),
    # operators of wide tensors
    "functions": lambda p: double(p).sin().exp().sqrt().pow(2.5),
    "reductions": lambda p: (
        double(p).mean(), double(p).std(), double(p).max(0), double(p).argmax(), double(p).norm(),
    ),
    "views": lambda p: (square(p).T[1:, ::2], square(p).reshape(-1), square(p).diagonal()),
    "sorted": lambda p: torch.sort(double(p), descending=True),
    "masked": lambda p: double(p)[double(p) > 1],
    "einsum": lambda p: torch.einsum("ij,j->i", square(p), double(p)),
    "interpolated": lambda p: nn.functional.interpolate(square(p)[None, None], scale_factor=2.0),
    "attention": lambda p: nn.functional.scaled_dot_product_attention(*[square(p)[None, None]] * 3),
    "convolution": lambda p: torch.conv2d(square(p)[None, None], square(p)[None, None, :2, :2]),
    "layer norm": lambda p: nn.functional.layer_norm(square(p), (3,)),
    "loss": lambda p: nn.functional.mse_loss(single(p), double(p)),
    "histogram, by PyTorch's kernel": lambda p: torch.histc(double(p), 3),
    "Bessel, by PyTorch's kernel": lambda p: torch.special.modified_bessel_k0(double(p)),
    # linear algebra
    "inverse": lambda p: torch.linalg.inv(square(p)),
    "solve": lambda p: torch.linalg.solve(square(p), double(p)),
    "determinant": lambda p: torch.linalg.slogdet(square(p)),
    "eigenvalues": lambda p: torch.linalg.eigvalsh(square(p) + square(p).T),
    "complex eigenvalues": lambda p: torch.linalg.eigvals(square(p)).real.sort()[0],
    "cholesky": lambda p: torch.linalg.cholesky(square(p) @ square(p).T),
    "singular values": lambda p: torch.linalg.svdvals(square(p)),
    "matrix exponential": lambda p: torch.matrix_exp(square(p) / 4),
    # complex
    "complex of parts": cplx,
    "parts": lambda p: (cplx(p).real, cplx(p).imag, cplx(p).abs(), cplx(p).angle()),
    "view_as_real": lambda p: torch.view_as_real(cplx(p)),
    "view_as_complex": lambda p: torch.view_as_complex(square(p)[:, :2].contiguous()),
    "polar": lambda p: torch.polar(double(p), double(p)),
    "fft": lambda p: (torch.fft.fft(double(p)), torch.fft.rfft(double(p)), torch.fft.ifft(cplx(p))),
    "complex beside float32": lambda p: cplx(p) * single(p),
    "complex64 beside float64": lambda p: cplx(p).to(torch.complex64) * double(p),
}  # fmt: skip


def listed(x: Any) -> list[Any]:
    return [y for z in x for y in listed(z)] if isinstance(x, list | tuple) else [x]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", PROGRAMS)
def test_as_on_the_cpu(name: str) -> None:
    here, there = listed(PROGRAMS[name]("jax")), listed(PROGRAMS[name]("cpu"))
    for x, y in zip(here, there, strict=True):
        assert x.device.type == "jax"
        close(x, y, 1e-4)
        assert x.jax().dtype.itemsize == {8: 4, 16: 8}.get(x.dtype.itemsize, x.dtype.itemsize)


@pytest.mark.usefixtures("quiet")
def test_drawn_numbers() -> None:
    made = [
        torch.rand(500, dtype=torch.float64, device="jax"),
        torch.rand_like(torch.zeros(500, device="jax").double()),
        torch.zeros(500, dtype=torch.float64, device="jax").uniform_(),
    ]
    for x in made:
        assert x.dtype is torch.float64
        assert 0.4 < x.mean() < 0.6
    x = torch.randn(500, dtype=torch.float64, device="jax")
    assert x.dtype is torch.float64
    assert 0.8 < x.std() < 1.2
    assert torch.normal(x, 1.0).dtype is torch.float64
    assert torch.bernoulli(x.sigmoid()).dtype is torch.float64
    assert torch.randn(2, dtype=torch.complex128, device="jax").dtype is torch.complex128


@pytest.mark.usefixtures("quiet")
def test_the_default_dtype() -> None:
    def made(p: str) -> list[torch.Tensor]:
        half = torch.ones(2, dtype=torch.bfloat16, device=p)
        return [
            torch.ones(2, device=p), torch.tensor([1.5], device=p), torch.arange(3, device=p) / 2,
            torch.arange(3, device=p).sqrt(), torch.arange(3, device=p) * 1.5, half * 1.5,
            torch.linspace(0, 1, 3, device=p), torch.tensor([1j], device=p), half.float() * 1.5,
            torch.full((2,), 1.5, device=p), nn.BatchNorm1d(2, device=p).weight,
        ]  # fmt: skip

    with default_dtype(torch.float64):
        for x, y in zip(made("jax"), made("cpu"), strict=True):
            close(x, y)


@pytest.mark.usefixtures("quiet")
def test_values_on_the_way_out() -> None:
    x: Any = torch.tensor([0.1, 1.5], dtype=torch.float64, device="jax")
    assert x[1].item() == 1.5
    assert type(x[1].item()) is float
    assert x.tolist() == [np.float32(0.1), 1.5]
    assert x.numpy().dtype == np.float64
    assert np.asarray(x).dtype == np.float64
    assert x.cpu().dtype is torch.float64
    assert x.jax().dtype == jnp.float32
    assert "dtype=torch.float64" in repr(x)
    assert device.jax_view(x).dtype == jnp.float32
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    assert torch.load(file, map_location="cpu").dtype is torch.float64
    file.seek(0)
    close(torch.load(file, map_location="jax"), x)


@pytest.mark.usefixtures("quiet")
def test_bounds_of_float64_are_good_for_float32() -> None:
    x = torch.tensor([0.0, 1.0, 0.5], device="jax").double()
    info = torch.finfo(x.dtype)
    assert x.masked_fill(x > 0.7, info.min).softmax(0).isfinite().all()
    assert torch.full((3,), info.min, dtype=x.dtype, device="jax").softmax(0).isfinite().all()
    assert torch.tensor(info.max, dtype=x.dtype, device="jax").isfinite()
    assert torch.full((1,), info.max, dtype=torch.float64).to("jax").isfinite().all()
    assert torch.tensor([np.inf, -np.inf], dtype=torch.float64).to("jax").isinf().all()
    assert (x + info.tiny).log().isfinite().all()
    assert x.clamp(info.eps, 1 - info.eps).logit().isfinite().all()
    y = x.clone()
    y[0] = info.min
    assert y.isfinite().all()
    assert torch.distributions.Bernoulli(probs=x).logits.isfinite().all()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("other", [torch.int64, torch.float32, torch.complex64], ids=str)
def test_bits_are_not_there(other: torch.dtype) -> None:
    with pytest.raises(UnsupportedDtypeError, match=r"bits of torch\.float64"):
        torch.ones(4, dtype=torch.float64, device="jax").view(other)
    with pytest.raises(UnsupportedDtypeError, match=r"bits of torch\.float64"):
        torch.ones(4, dtype=other, device="jax").view(torch.float64)


# --- gradients -----------------------------------------------------------------------------------

GRADIENTS: dict[str, Any] = {
    "of a cast": lambda x: x.double().square().sum(),
    "of a cast back": lambda x: x.square().float().sum(),
    "beside float32": lambda x: (x * single(x.device)).sum(),
    "complex": lambda x: torch.complex(x, x.cos().to(x.dtype)).abs().sum(),
    "linear algebra": lambda x: torch.linalg.det(torch.outer(x, x) + torch.eye(3).to(x)),
}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_have_the_dtype_of_their_tensor(
    name: str, dtype: torch.dtype, compiled: bool
) -> None:
    found = []
    for where in ("jax", "cpu"):
        x = single(where).to(dtype).requires_grad_()
        f = GRADIENTS[name]
        if where == "jax" and compiled:
            f = device.jit(f)
            f(x)
        y = f(x)
        y.backward()
        found.append((y, x.grad))
    for here, there in zip(*found, strict=True):
        close(here, there, 1e-4)


@pytest.mark.usefixtures("quiet")
def test_gradients_of_gradients() -> None:
    for dtype in (torch.float32, torch.float64):
        found = []
        for where in ("jax", "cpu"):
            x = single(where).to(dtype).requires_grad_()
            (slope,) = torch.autograd.grad(x.double().pow(3).sum(), x, create_graph=True)
            slope.sin().sum().backward()
            found += [slope, x.grad]
        close(found[0], found[2])
        close(found[1], found[3], 1e-4)


@pytest.mark.usefixtures("quiet")
def test_gradients_of_jax_functions() -> None:
    x = double("jax").requires_grad_()
    y: Any = device.call_jax(jnp.sin, x)
    assert y.dtype is torch.float32  # JAX says what its results are
    y.sum().backward()
    close(x.grad, double("cpu").cos())


# --- modules -------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 2))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("order", ["double, move", "move, double"])
def test_a_module_trains(order: str) -> None:
    there = network().double()
    here = network().double().to("jax") if order == "double, move" else network().to("jax").double()
    x = torch.randn(5, 3, dtype=torch.float64)
    for model, given in ((there, x), (here, x.to("jax"))):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            model(given).square().sum().backward()
            optimizer.step()
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        close(a, b, 1e-4)
        close(a.grad, b.grad, 1e-4)
    close(here.eval()(x.to("jax")), there.eval()(x), 1e-4)


@pytest.mark.usefixtures("quiet")
def test_state_dicts_go_round() -> None:
    there = network().double()
    here = copy.deepcopy(there).to("jax")
    back = network().double()
    back.load_state_dict(here.state_dict())
    for a, b in zip(back.state_dict().values(), there.state_dict().values(), strict=True):
        close(a, b)
    narrow = network().to("jax")
    narrow.load_state_dict(there.state_dict())  # a checkpoint of float64 into a float32 model
    assert {p.dtype for p in narrow.parameters()} == {torch.float32}
    here.load_state_dict(there.state_dict())
    assert {p.dtype for p in here.parameters()} == {torch.float64}
    assert {p.dtype for p in here.float().parameters()} == {torch.float32}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: Any) -> None:
    there = kind(3, 4, bidirectional=True).double()
    here = copy.deepcopy(there).to("jax")
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    compiled: Any = device.jit(lambda x: here(x)[0])
    compiled(x.to("jax"))
    for out in (here(x.to("jax"))[0], compiled(x.to("jax"))):
        close(out, there(x)[0])


# --- warnings ------------------------------------------------------------------------------------

LINES: dict[str, Any] = {
    "a factory": lambda: torch.ones(2, dtype=torch.float64, device="jax"),
    "a cast": lambda: torch.ones(2, device="jax").double(),
    "a move": lambda: torch.ones(2, dtype=torch.float64).to("jax"),
    "an operator": lambda: torch.ones(2, device="jax").cumsum(0, dtype=torch.float64),
    "like another": lambda: torch.zeros_like(torch.ones(2, device="jax"), dtype=torch.float64),
    "data": lambda: torch.tensor([1.0], dtype=torch.float64, device="jax"),
    "complex128": lambda: torch.ones(2, dtype=torch.complex128, device="jax"),
    "drawn": lambda: torch.rand(2, dtype=torch.float64, device="jax"),
    "a module": lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double().to("jax"),
    "a decomposition": lambda: torch.trace(torch.eye(2, device="jax")).double(),
    "through torchax": lambda: tx.default_env().t2j_copy(torch.ones(2, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", LINES)
def test_one_warning_names_the_line(name: str) -> None:
    run = LINES[name]
    for _ in range(2):  # the second time programs are known
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(3):
                run()
        (found,) = caught
        assert found.category is Torch2JaxWarning
        assert WIDE in str(found.message)
        assert (found.filename, found.lineno) == (__file__, run.__code__.co_firstlineno)


def test_each_line_has_a_warning_of_its_own() -> None:
    x = torch.ones(2, device="jax")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        line = sys._getframe().f_lineno
        x.double()
        x.double()
    assert [w.lineno for w in caught] == [line + 1, line + 2]


@pytest.mark.usefixtures("quiet")
def test_what_is_wide_already_warns_no_more() -> None:
    x = double("jax").requires_grad_()
    y = single("jax").double()
    z = single("jax").requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (x * y + 1).sin().sum().backward()
        torch.zeros_like(y).add_(y)
        y[0] = 2.5
        _ = y.cpu(), y.float(), y.abs().max(), y.clone()
    loss = z.double().float().sum() + x.float().sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss.backward()  # the gradient of x.float() is cast to float64


def test_a_compiled_function_warns_where_it_is_written() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x.double() * 2

    compiled = device.jit(f)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(4):
            out = compiled(torch.ones(2, device="jax"))
    assert [w.lineno for w in caught] == [f.__code__.co_firstlineno + 1]
    close(out, torch.full((2,), 2.0, dtype=torch.float64))


def test_with_x64_nothing_is_said() -> None:
    with precision(True):
        for run in LINES.values():
            run()
        x: Any = torch.ones(2, dtype=torch.float64, device="jax")
        assert x.jax().dtype == jnp.float64
        assert (x / 3).cpu().equal(torch.ones(2, dtype=torch.float64) / 3)


# --- strict mode ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINES)
def test_strict(name: str) -> None:
    dtype = torch.complex128 if name == "complex128" else torch.float64
    with device.strict_float64(), pytest.raises(UnsupportedDtypeError, match="jax_enable_x64") as e:
        LINES[name]()
    assert str(dtype) in str(e.value)


def test_strict_about_results_of_operators() -> None:
    ints = torch.arange(3, device="jax")
    with device.strict_float64(), default_dtype(torch.float64):
        with pytest.raises(Torch2JaxError, match="strict_float64"):
            _ = ints / 2
        with pytest.raises(UnsupportedDtypeError, match="strict_float64"):
            torch.ones(3, device="jax")


def test_strict_as_a_statement() -> None:
    device.strict_float64()
    try:
        with pytest.raises(UnsupportedDtypeError, match="strict_float64"):
            double("jax")
        with device.strict_float64(False), pytest.warns(Torch2JaxWarning, match=WIDE):
            double("jax")
        with pytest.raises(UnsupportedDtypeError, match="strict_float64"):
            double("jax")
    finally:
        device.strict_float64(False)
    with pytest.warns(Torch2JaxWarning, match=WIDE):
        double("jax")


def test_uint64_is_an_error() -> None:
    with pytest.raises(UnsupportedDtypeError, match="jax_enable_x64"):
        torch.ones(2, dtype=torch.uint64, device="jax")


def test_scaled_gradients_need_no_float64() -> None:
    """GradScaler's own use of float64 is no concern of the user's."""
    scaler = torch.amp.GradScaler("jax", init_scale=8.0)  # type: ignore[arg-type]
    p = nn.Parameter(torch.ones(2, device="jax"))
    optimizer = torch.optim.SGD([p], 0.5)
    scaler.scale((p * 2).sum()).backward()
    scaler.step(optimizer)
    assert p.tolist() == [0.0, 0.0]


def test_traced_arrays_have_32_bits() -> None:
    with pytest.warns(Torch2JaxWarning, match=WIDE):
        jaxpr = jax.make_jaxpr(device.jax_view(lambda x: x.double() + 1))(jnp.ones(2))
    assert "f64" not in str(jaxpr)


# --- programs ------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """Embed positions as FLUX and Wan do: angles of float64, turned as complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[0], device=x.device).double()
        scale = torch.arange(0, 8, 2, dtype=torch.float64, device=x.device) / 8
        angles = torch.outer(positions, 1.0 / (10000.0**scale))
        turns = torch.polar(torch.ones_like(angles), angles)

        def turned(y: torch.Tensor) -> torch.Tensor:
            pairs = torch.view_as_complex(y.double().unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * turns).flatten(-2).type_as(y)

        scores = turned(self.queries(x)) @ turned(self.keys(x)).mT
        return scores.softmax(-1) @ x


class Solver(nn.Module):
    """Solve an ODE as solvers do: times and steps are float64, states are not."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        times = torch.linspace(0, 1, 6, dtype=torch.float64, device=x.device)
        for t, dt in zip(times, times.diff(), strict=False):
            assert dt.dtype == torch.float64
            x = x + dt * self.field(x) * torch.exp(-t)
        return x


MODELS: dict[str, Any] = {"rotary": (Rotary, (6, 8)), "solver": (Solver, (4, 3))}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    there = make()
    here = copy.deepcopy(there).to("jax")
    compiled: Any = device.jit(here)
    x = torch.randn(shape)
    expected = there(x)
    expected.square().sum().backward()
    compiled(x.to("jax"))
    for model in (here, compiled):
        out = model(x.to("jax"))
        assert out.dtype is torch.float32
        close(out, expected)
        here.zero_grad()
        out.square().sum().backward()
        for a, b in zip(here.parameters(), there.parameters(), strict=True):
            close(a.grad, b.grad, 1e-4)


@pytest.mark.usefixtures("quiet")
def test_torchdiffeq() -> None:
    """Its solvers with adaptive steps keep the time in float64."""
    torch.manual_seed(0)
    there = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    here = copy.deepcopy(there).to("jax")
    found = []
    for where, field in (("cpu", there), ("jax", here)):
        x = torch.tensor([0.5, -1.0], device=where)
        times = torch.linspace(0, 1, 3, device=where)
        path = torchdiffeq.odeint(lambda t, y, f=field: f(y), x, times, rtol=1e-4, atol=1e-5)
        assert path.dtype is torch.float32
        path.square().sum().backward()
        found.append([path, *[p.grad for p in field.parameters()]])
    for a, b in zip(found[1], found[0], strict=True):
        close(a, b, 1e-3)
