"""What holds for Flax and Equinox alike: names, lazy modules, what is missing and what is imported."""

from __future__ import annotations

import copy
import doctest
import importlib
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from adapter_models import data, mlp
from torch import nn

import torch2jax as package

pytestmark = pytest.mark.optimized

REASON = "the extra `test` is not installed"
flax = pytest.importorskip("flax", reason=REASON)
eqx = pytest.importorskip("equinox", reason=REASON)


# --- names and lazy modules ------------------------------------------------------------------------


class Clashing(nn.Module):
    """Keywords with the names that ``apply`` has, and one that is static."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Any, train: Any = None, rng: Any = None, mode: str = "plain") -> Any:
        out = self.linear(x) + (0 if train is None else train) + (0 if rng is None else rng)
        return {"out": -out if mode == "minus" else out}


@pytest.mark.parametrize("library", ["flax", "equinox"])
def test_keywords_of_the_module_never_clash(library: str) -> None:
    module, (x, _) = Clashing(), data()
    model: Any = importlib.import_module(f"{package.__name__}.{library}").TorchModule(module)
    out = model(x, train=jnp.float32(2), rng=jnp.float32(3), mode="minus")["out"]
    expected = -(module.linear(torch.from_numpy(x)) + 5).detach()
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize("library", ["flax", "equinox"])
def test_lazy_modules(library: str) -> None:
    module = nn.Sequential(nn.LazyLinear(4))
    kind: Any = importlib.import_module(f"{package.__name__}.{library}").TorchModule
    with pytest.raises(package.SignatureError, match="lazy"):
        kind(module)
    assert kind(module, torch.ones(2, 3))(jnp.ones((2, 3))).shape == (2, 4)


# --- what is missing, and what is not imported ---------------------------------------------------


@pytest.mark.parametrize("library", ["flax", "equinox"])
def test_missing_library(library: str) -> None:
    code = f"""
import sys
import {package.__name__} as package
assert {library!r} not in sys.modules, "the package itself imports it"
sys.modules[{library!r}] = None
try:
    import {package.__name__}.{library}
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"pip install 'torch2jax-ffi[{library}]'" in done.stdout


def test_adapters_are_imported_on_use() -> None:
    code = f"""
import sys
import {package.__name__} as package
print(any(name in sys.modules for name in ("flax", "equinox")))
print(package.flax.TorchModule.__name__, package.equinox.TorchModule.__name__)
try:
    package.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, names, error = done.stdout.splitlines()
    assert before == "False"
    assert names == "TorchModule TorchModule"
    assert error == f"module {package.__name__!r} has no attribute 'nothing'"


@pytest.mark.parametrize("library", ["flax", "equinox"])
def test_deepcopy(library: str) -> None:
    """Averages of weights and targets of reinforcement learning begin with one."""
    module, (x, _) = mlp(), data()
    model: Any = importlib.import_module(f"{package.__name__}.{library}").TorchModule(module)
    out = model(x)
    np.testing.assert_array_equal(copy.deepcopy(model)(x), out)


@pytest.mark.parametrize("library", ["flax", "equinox"])
def test_docstrings(library: str) -> None:
    module = importlib.import_module(f"{package.__name__}.{library}")
    failed, attempted = doctest.testmod(module)
    assert attempted
    assert not failed
