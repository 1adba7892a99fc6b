"""The package under a second import name: both work in one process (install_package_aliased.py)."""

from __future__ import annotations

import doctest
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "install_package_aliased.py"
ALIAS = "torch2jax_beside"

# Both names in one process, each under jit and grad, and one inside the other.
SIDE_BY_SIDE = f"""
import jax, jax.numpy as jnp, numpy as np, torch
import torch2jax as original
import {ALIAS} as alias

x = jnp.linspace(0.1, 0.9, 5)
assert original is not alias and original.__file__ != alias.__file__
for package in (original, alias):
    f = package.torch2jax(lambda a: torch.sin(a) * a)
    np.testing.assert_allclose(jax.jit(f)(x), jnp.sin(x) * x, rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda a: f(a).sum()))(x)
    np.testing.assert_allclose(gradient, jnp.cos(x) * x + jnp.sin(x), rtol=1e-6)
    targets = jax.jit(f).lower(x).as_text()
    assert f"@{{package.__name__}}(" in targets, targets

inner, outer = alias.torch2jax(torch.exp), original.torch2jax(torch.sin)
chained = jax.jit(jax.grad(lambda a: outer(inner(a)).sum()))(x)
np.testing.assert_allclose(chained, jnp.cos(jnp.exp(x)) * jnp.exp(x), rtol=1e-5)
assert not issubclass(alias.Torch2JaxError, original.Torch2JaxError)
print("both work")
"""


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_package_aliased", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_tools_are_here() -> bool:
    """What `--no-build-isolation` needs; with it the build is quick and fetches nothing."""
    modules = ("scikit_build_core", "nanobind", "jaxlib")
    cmake = shutil.which("cmake") or importlib.util.find_spec("cmake")
    return bool(cmake) and all(importlib.util.find_spec(name) for name in modules)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def alias_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alias")
    options = ["--no-build-isolation"] if build_tools_are_here() else []
    done = run(sys.executable, str(SCRIPT), ALIAS, "--target", str(folder), *options)
    assert done.returncode == 0, done.stdout
    return folder


def test_both_names_work_in_one_process(alias_folder: Path) -> None:
    path = os.pathsep.join([str(alias_folder), os.environ.get("PYTHONPATH", "")])
    done = run(sys.executable, "-c", SIDE_BY_SIDE, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("both work\n")


def test_nothing_of_the_original_is_left_in_the_alias(alias_folder: Path) -> None:
    """The package imports itself relatively, and its metadata bears the new name alone."""
    installed = {entry.name for entry in alias_folder.iterdir()}
    assert ALIAS in installed
    assert "torch2jax" not in installed
    (info,) = alias_folder.glob("*.dist-info")
    assert re.search(
        rf"^Name: {ALIAS}$", (info / "METADATA").read_text(encoding="utf-8"), re.MULTILINE
    )
    absolute = re.compile(r"^\s*(from torch2jax\b|import torch2jax\b)", re.MULTILINE)
    for path in (alias_folder / ALIAS).rglob("*.py"):
        assert not absolute.search(path.read_text(encoding="utf-8")), path


def test_the_compiler_backend_has_the_new_name(alias_folder: Path) -> None:
    """`torch.compile(backend=...)` looks it up in the metadata of what is installed."""
    (info,) = alias_folder.glob("*.dist-info")
    lines = (info / "entry_points.txt").read_text(encoding="utf-8").split("\n")
    assert "[torch_dynamo_backends]" in lines
    assert any(
        re.fullmatch(rf"{ALIAS} ?= ?{ALIAS}\._lower\.torch_compile:backend", line) for line in lines
    )
    assert not any(re.match(r"torch2jax\b", line) for line in lines)


def test_sources_import_the_package_relatively() -> None:
    """An absolute import would reach for the original when the package has another name."""
    absolute = re.compile(r"^\s*(from torch2jax\b|import torch2jax\b)", re.MULTILINE)
    for path in (ROOT / "src").rglob("*.py"):
        assert not absolute.search(path.read_text(encoding="utf-8")), path


def test_imports_are_rewritten() -> None:
    assert doctest.testmod(script()).failed == 0


@pytest.mark.parametrize("name", ["torch2jax", "not-a-name", "class", "1st"])
def test_impossible_names_are_refused(name: str) -> None:
    done = run(sys.executable, str(SCRIPT), name, "--install")
    assert done.returncode == 2
    assert "NAME" in done.stdout
