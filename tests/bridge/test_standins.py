"""Inference on stand-ins shows what inference on fake tensors shows, and loads nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torch2jax import TorchCallError, torch2jax
from torch2jax._bridge.torch_side import inference, standins

Infer = Callable[..., "inference.Inference | None"]

OWN = torch.ones(4)

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "arithmetic": lambda a, b: (a + b * 2 - 1, a / b, a // 2, a % 3, -a),
    "comparison": lambda a, b: ((a > b) & (a != 1), a.eq(b).any(), (a < b).all(0)),
    "promotion": lambda a, b: (a + 1.5, a.to(torch.float64) + b, a.bool(), a * True),
    "elementwise": lambda a, b: (torch.sin(a), torch.exp(b).tanh(), torch.sqrt(a.abs())),
    "activations": lambda a, b: (F.relu(a), F.gelu(a), F.silu(b), F.softmax(a, -1)),
    "log_softmax": lambda a, b: F.log_softmax(a, 0, dtype=torch.float64),
    "products": lambda a, b: (a @ b, torch.addmm(a[0], a, b), a[None] @ b, F.linear(a, b, a[0])),
    "einsum": lambda a, b: torch.einsum("ij,kj->ik", a, b),
    "reductions": lambda a, b: (a.sum(), a.sum(0, keepdim=True), a.amax(1), a.max(0)[1], a.prod()),
    "statistics": lambda a, b: (a.mean(), b.var(0), a.std(), F.mse_loss(a, b)),
    "cumulative": lambda a, b: (a.cumsum(0), b.argmax(), b.argmin(1)),
    "views": lambda a, b: (a.reshape(2, 8).T, a[1:, ::2], a[:, None].expand(4, 3, 4), a.flatten()),
    "pieces": lambda a, b: (*a.chunk(2), *b.split([1, 3]), *a.unbind(1)),
    "joined": lambda a, b: (torch.cat([a, b]), torch.stack([a, b], -1), torch.zeros_like(a)),
    "where": lambda a, b: (torch.where(a > 0, a, b), torch.where(b > 0, b, 0)),
    "layer_norm": lambda a, b: F.layer_norm(a, (4,), b[0], b[1]),
    "structure": lambda a, b: {"x": [a], "y": (b.clone(), a.detach())},
    "device": lambda a, b: a if a.device.type == "cpu" and not a.is_meta else a[0],
}
GIVEN_UP: dict[str, Callable[..., Any]] = {
    "in place": lambda a, b: a.clone().add_(b),
    "changes its operand": lambda a, b: a.mul_(2),
    "factory": lambda a, b: a + torch.ones(4),
    "a tensor of its own": lambda a, b: a + OWN,
    "draws": lambda a, b: F.dropout(a, 0.5, True),
    "asks": lambda a, b: a if a.sum() > 0 else b[0],
    "item": lambda a, b: a * b[0, 0].item(),
    "numpy": lambda a, b: torch.from_numpy(a.numpy()) + 1,
    "tolist": lambda a, b: a * b.tolist()[0][0],
    "values": lambda a, b: a[a > 0],
    "unknown operator": lambda a, b: torch.linalg.inv(a),
    "catches what is raised": lambda a, b: catching(a),
    "another device": lambda a, b: a.to("meta"),
}


def catching(a: torch.Tensor) -> torch.Tensor:
    try:
        return a.clone().add_(1)[0]
    except Exception:
        return a


def infer(fn: Any, dtype: torch.dtype, on: str, shape: tuple[int, ...] = (4, 4)) -> Any:
    spec = inference.Spec(shape, dtype, torch.device("cpu"))
    integers = inference.IntegerUse()

    def describe(out: Any) -> Any:
        leaves, tree = torch.utils._pytree.tree_flatten(out)
        return [(tuple(t.shape), t.dtype, t.device.type) for t in leaves], str(tree)

    trial = inference._Trial(fn, (spec, spec), describe, torch.float32, (fn,), integers)
    found = getattr(trial, on)()
    return found and (found, integers.unproven)


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests have loaded fake tensors."""
    monkeypatch.setattr(inference, "fakes_are_loaded", lambda: False)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool, torch.complex64], ids=str
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_on_fake_tensors(name, dtype):
    try:
        expected = infer(FUNCTIONS[name], dtype, "on_fakes")
    except Exception:
        expected = None  # PyTorch has no such operator for the dtype
    found = infer(FUNCTIONS[name], dtype, "on_standins")
    if dtype is torch.float32:
        assert found is not None
    if found is not None:
        assert found == expected


@pytest.mark.parametrize("name", GIVEN_UP)
def test_given_up(name):
    fn = GIVEN_UP[name]
    assert infer(fn, torch.float32, "on_standins") is None


def test_large_tensors_are_given_up():
    def outer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a[:, None] + b

    n = standins._LARGE
    assert infer(torch.add, torch.float32, "on_standins", (n,)) is not None
    assert infer(torch.add, torch.float32, "on_standins", (n + 1,)) is None
    assert infer(outer, torch.float32, "on_standins", (n,)) is None


@pytest.mark.filterwarnings("ignore:.*changes args:torch2jax.Torch2JaxWarning")
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", [n for n in GIVEN_UP if n not in ("values", "another device")])
def test_calls_of_what_is_given_up(name, jit):
    """They are right all the same, as if there were no stand-ins."""
    if jit and name in ("asks", "item", "numpy", "tolist"):
        pytest.skip("it asks for values; an eager call has them")
    fn = GIVEN_UP[name]
    a, b = 2 * jnp.eye(4), jnp.full((4, 4), 3.0)
    f = torch2jax(fn, stochastic=name == "draws")
    kw = {"rng": jax.random.key(0)} if name == "draws" else {}
    out = (jax.jit(f) if jit else f)(a, b, **kw)
    expected = fn(torch.eye(4) * 2, torch.full((4, 4), 3.0))
    if name == "draws":
        assert out.shape == expected.shape
    else:
        np.testing.assert_allclose(out, expected.numpy())


def test_exceptions_are_those_of_the_function():
    def raises(a: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")

    with pytest.raises(TorchCallError, match="raised KeyError when it was traced: 'mine'"):
        torch2jax(raises)(jnp.ones(3))
    with pytest.raises(TorchCallError, match=r"mat1 and mat2 shapes|size mismatch|must match"):
        torch2jax(lambda a: a @ a[:3])(jnp.ones((4, 4)))


def test_a_tensor_that_is_kept_is_taken_out():
    kept: list[torch.Tensor] = []

    def keeps(a: torch.Tensor) -> torch.Tensor:
        if not kept:
            kept.append((a * 2).sum())
        return a + 1

    np.testing.assert_allclose(torch2jax(keeps)(jnp.ones(3)), 2 * np.ones(3))
    assert not [t for t in kept if isinstance(t, standins.Standin)]


def test_a_first_call_loads_no_compiler():
    """Fake tensors load all of torch.compile: seconds."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False", "True"]


PROGRAM = """
import sys
import jax, jax.numpy as jnp, torch
from torch2jax import torch2jax
x = jnp.arange(4.0)
f = torch2jax(lambda a, b: torch.tanh(a * b) + a)
assert jnp.allclose(f(x, x), jnp.tanh(x * x) + x)
print("torch._dynamo" in sys.modules)
g = jax.jit(jax.grad(lambda x: f(x, x).sum()))(x)
assert jnp.allclose(g, 2 * x / jnp.cosh(x * x) ** 2 + 1, atol=1e-5)
print("torch._dynamo" in sys.modules)
assert jnp.allclose(torch2jax(lambda a: a + torch.ones(4))(x), x + 1)  # it needs fake tensors
print("torch._dynamo" in sys.modules)
"""


def test_the_import_loads_no_pallas():
    program = "import torch2jax, sys; print('jax._src.pallas.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")
    assert done.stdout.strip() == "False", done.stderr
