"""Floats of 64 bits under ``lower=True`` with x64 off: JAX has 32 bits, and ``fn`` sees float64.

Expected values are PyTorch's on the CPU in float64, or those of the same function in jax.numpy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import hugging_face as hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from harness import close, default_dtype, precision
from lowered_models import leaves, wave
from torch import nn

from torch2jax import (
    Torch2JaxError,
    Torch2JaxWarning,
    UnsupportedDtypeError,
    device,
    from_module,
    torch2jax,
)
from torch2jax import torchax as tx

WIDE = "not available while 64-bit values are switched off"
X = np.array([0.5, 1.5, 2.5], np.float32)


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{WIDE}")
        yield


CONSTANT = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotate pairs by angles of float64, as FLUX's embedding of positions does."""
    scale = torch.arange(0, 4, 2, dtype=torch.float64, device=x.device) / 4
    angles = torch.outer(torch.arange(3.0, device=x.device).double(), 1.0 / 100.0**scale)
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(torch.outer(x, x.new_ones(4)).double().reshape(3, 2, 2))
    return torch.view_as_real(pairs * turns).flatten(1).type_as(x)


FUNCTIONS: dict[str, Any] = {
    "double": lambda x: x.double(),
    "there and back": lambda x: (x.double() * 2).to(x.dtype),
    "checked": lambda x: (y := x.double()) * (2 if y.dtype == torch.float64 else math.nan),
    "a factory": lambda x: x * torch.arange(3, dtype=torch.float64),
    "a constant": lambda x: x * CONSTANT,
    "numpy": lambda x: x + torch.from_numpy(np.array([0.1, 0.2, 0.3])),
    "tensor": lambda x: x + torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
    "cumsum": lambda x: x.cumsum(0, dtype=torch.float64),
    "a sum": lambda x: x.sum(dtype=torch.float64),
    "softmax": lambda x: torch.softmax(x, 0, dtype=torch.float64),
    "complex128": lambda x: (x.to(torch.complex128) * 1j).imag,
    "linear algebra": lambda x: torch.linalg.inv(torch.outer(x, x).double() + 2 * torch.eye(3)),
    "promotion": lambda x: torch.cat([x, x.double()]).to(torch.result_type(x, CONSTANT)),
    "bounds": lambda x: x.double().masked_fill(x > 1, torch.finfo(torch.float64).min).softmax(0),
    "in place": lambda x: x.double().clone().mul_(x).index_add_(0, torch.tensor([0]), x[:1].double()),
    "a rotation": rotated,
    "PyTorch's kernel": lambda x: torch.special.modified_bessel_k0(x.double()),
}  # fmt: skip


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(name: str) -> None:
    f = torch2jax(FUNCTIONS[name], lower=True)
    expected = FUNCTIONS[name](torch.tensor(X))
    for out in (f(jnp.asarray(X)), jax.jit(f)(X)):
        assert out.dtype == jnp.float32
        close(out, expected)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", [n for n in FUNCTIONS if "kernel" not in n])
def test_derivatives(name: str) -> None:
    f, g = torch2jax(FUNCTIONS[name], lower=True), FUNCTIONS[name]
    x = torch.tensor(X, requires_grad=True)
    g(x).sin().sum().backward()
    close(jax.grad(lambda x: jnp.sin(f(x)).sum())(X), x.grad, 1e-4)
    primal, tangent = jax.jvp(f, (X,), (np.ones_like(X),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of forward mode
        want = torch.func.jvp(g, (torch.tensor(X),), (torch.ones(3),))
    close(primal, want[0], 1e-4)
    close(tangent, want[1], 1e-4)


@pytest.mark.usefixtures("quiet")
def test_what_fn_sees() -> None:
    seen: list[Any] = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x.double()
        z = torch.arange(3, device=x.device, dtype=torch.float64)
        (slope,) = torch.autograd.grad((y.requires_grad_() ** 2).sum(), y)
        seen[:] = [x.dtype, y.dtype, (y * x).dtype, (x * z[0]).dtype, slope.dtype, z.sum().dtype]
        return y

    torch2jax(fn, lower=True)(X)
    narrow, wide = torch.float32, torch.float64
    assert seen == [narrow, wide, wide, narrow, wide, wide]


@pytest.mark.usefixtures("quiet")
def test_arguments_that_are_said_to_be_float64() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        assert x.dtype is torch.float64
        return x * 2

    for dtypes in (torch.float64, (torch.float64,)):
        out = torch2jax(fn, lower=True, arg_dtypes=dtypes)(X)
        assert out.dtype == jnp.float32
        close(out, 2 * X)
    out = torch2jax(lambda x: x * 2, lower=True)(X.astype(np.float64))  # as JAX takes them
    assert out.dtype == jnp.float32


@pytest.mark.usefixtures("quiet")
def test_the_default_dtype() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        assert torch.ones(3).dtype is torch.float64
        return x * torch.ones(3) + torch.arange(3) / 2

    with default_dtype(torch.float64):
        out = torch2jax(fn, lower=True)(X)
        want = fn(torch.tensor(X))
    close(out, want)


# --- modules -------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        self.register_buffer("scale", torch.linspace(0.1, 1.0, 2, dtype=torch.float64))
        self.register_buffer(
            "shift", torch.tensor([0.1, 0.2], dtype=torch.float64), persistent=False
        )
        self.frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.inner[0].weight
        assert self.scale.dtype is torch.float64
        assert weight.dtype is torch.float64
        out = self.inner(x.to(weight.dtype))
        return (out * self.scale + self.shift) * self.frozen


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("lower", [True, False], ids=["lower", "bridge"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_modules_of_float64(train: bool, lower: bool) -> None:
    module = Net()
    x = wave(5, 3)
    apply, variables = from_module(module, lower=lower)
    assert {a.dtype for a in jax.tree.leaves(variables)} <= {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }

    def loss(params: Any) -> Any:
        out = apply({**variables, "params": params}, x.numpy(), train=train)
        out = out[0] if train else out
        assert out.dtype == jnp.float32
        return (out**2).sum(), out

    grads, out = jax.grad(loss, has_aux=True)(variables["params"])
    want = module.train(train)(x)
    (want**2).sum().backward()
    close(out, want, 1e-4)
    for name, p in module.named_parameters():
        if p.requires_grad:
            assert grads[name].dtype == jnp.float32
            close(grads[name], p.grad, 1e-4)


@pytest.mark.usefixtures("quiet")
def test_modules_that_are_closed_over() -> None:
    module = Net().eval()
    x = wave(5, 3)
    for f in (torch2jax(module, lower=True), torch2jax(lambda x: module(x), lower=True)):
        close(f(x.numpy()), module(x))
    state, fn = device.extract(module)
    assert state["scale"].dtype == jnp.float32
    close(fn(state, (jnp.asarray(x),)), module(x))


@pytest.mark.usefixtures("quiet")
def test_torch_compile() -> None:
    module = Net().eval()
    x = wave(5, 3)
    compiled = torch.compile(module, backend="torch2jax")
    close(compiled(x), module(x))


@pytest.mark.usefixtures("quiet")
def test_names_of_torchax() -> None:
    module = Net().eval()
    x = wave(5, 3)
    weights, fn = tx.extract_jax(module)
    close(fn(weights, (jnp.asarray(x),)), module(x))
    f = tx.interop.jax_jit(tx.interop.torch_view(jax.jit(lambda a: a * 2)))
    y = f(torch.ones(2, dtype=torch.float64).to("jax"))
    close(y.cpu().double(), torch.full((2,), 2.0, dtype=torch.float64))


# --- warnings ------------------------------------------------------------------------------------


def cast(x: torch.Tensor) -> torch.Tensor:
    return x.double() * 2


def test_one_warning_names_the_line() -> None:
    f = torch2jax(cast, lower=True)
    g = jax.jit(f)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            f(X)
            g(X)
    (found,) = caught
    assert found.category is Torch2JaxWarning
    assert WIDE in str(found.message)
    assert (found.filename, found.lineno) == (__file__, cast.__code__.co_firstlineno + 1)


@pytest.mark.parametrize("lower", [True, False], ids=["lower", "bridge"])
def test_one_warning_for_a_module(lower: bool) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    with pytest.warns(Torch2JaxWarning, match=WIDE) as caught:
        apply, variables = from_module(module, lower=lower, arg_dtypes=None)
    assert [w.filename for w in caught] == [__file__]
    if lower:
        apply(variables, X)  # a warning would be an error


def test_with_x64_nothing_is_said() -> None:
    with precision(True):
        out = torch2jax(cast, lower=True)(X)
        assert out.dtype == jnp.float64


def test_the_bridge_has_float64() -> None:
    """PyTorch itself computes there; only the result is narrow."""
    out = torch2jax(lambda x: (x.double() + 1e-12 - 1).float())(jnp.ones(2))
    close(out, np.full(2, 1e-12, np.float32), 1e-15)


def test_strict() -> None:
    with device.strict_float64():
        with pytest.raises(UnsupportedDtypeError, match="jax_enable_x64"):
            torch2jax(lambda x: x.double(), lower=True)(X)
        with pytest.raises(Torch2JaxError, match="jax_enable_x64"):
            torch2jax(lambda x: x * CONSTANT, lower=True)(X)
        with pytest.raises(UnsupportedDtypeError, match="jax_enable_x64"):
            from_module(nn.Linear(2, 2).double(), lower=True)
        torch2jax(lambda x: x.double())(X)  # the bridge needs no leave


# --- models --------------------------------------------------------------------------------------


def rt_detr() -> Any:
    """RT-DETR makes its positions in float64."""
    transformers = hf.transformers
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[12, 16, 20], encoder_hidden_dim=16,
        d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_layers=1, decoder_layers=1, num_queries=6, num_labels=3,
        decoder_in_channels=[16, 16, 16], num_denoising=0, dropout=0.0, anchor_image_size=None,
        eval_size=None, hidden_expansion=0.5, num_feature_levels=3, decoder_n_points=2,
    )  # fmt: skip
    model = transformers.RTDetrForObjectDetection(config)
    for p in model.parameters():  # as they are made all scores are equal, and top-k has ties
        nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.usefixtures("quiet")
def test_rt_detr() -> None:
    """Its values: PyTorch 2.13's own gradients are wrong for a batch of one. See reliability.md."""
    torch.manual_seed(0)
    model, x = rt_detr().eval(), wave(1, 3, 64, 64)
    apply, variables = from_module(model, lower=True)
    out = jax.jit(lambda v, x: leaves(apply(v, pixel_values=x)))(variables, jnp.asarray(x))
    with torch.no_grad():
        expected = leaves(model(pixel_values=x))
    assert len(out) == len(expected) > 2
    for a, b in zip(out, expected, strict=True):
        close(a, b, 1e-3)
