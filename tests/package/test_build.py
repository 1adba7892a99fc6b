"""What the built extension is allowed to be."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from linking import SYSTEM, needed

from torch2jax import _ext

LIBRARY = Path(_ext.__file__)
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="readelf reads ELF files")
def test_links_only_the_system() -> None:
    assert [name for name in needed(LIBRARY) if not re.fullmatch(SYSTEM, name)] == []


@pytest.mark.skipif(sys.platform != "linux", reason="nm reads ELF files")
def test_exports_only_the_module() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    text = subprocess.run(
        [nm, "-D", "--defined-only", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    functions = [line.split()[-1] for line in text.splitlines() if line.split()[-2] == "T"]
    assert functions == ["PyInit__ext"]


def test_size() -> None:
    assert LIBRARY.stat().st_size < 400_000


def test_stable_abi() -> None:
    stable = sys.version_info >= (3, 12) and "free-threading" not in sys.version
    assert (".abi3." in LIBRARY.name) == stable


def test_package_name_stands_once() -> None:
    """The C++ half can be built under another import name by changing one line."""
    if not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("not in a source tree")
    package = _ext.__name__.partition(".")[0]
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert cmake.count(package) == 1
    assert f"set(PACKAGE {package})" in cmake


def test_needs_nothing_installed_to_build() -> None:
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("not in a source tree")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = {re.match(r"[\w-]+", r)[0] for r in project["build-system"]["requires"]}  # type: ignore[index]
    assert names == {"scikit-build-core", "nanobind", "jaxlib"}


def test_pre_commit_has_the_versions_of_lint() -> None:
    if not (ROOT / ".pre-commit-config.yaml").exists():
        pytest.skip("not in a source tree")
    hooks = re.findall(
        r"additional_dependencies: \[(.*)\]", (ROOT / ".pre-commit-config.yaml").read_text()
    )
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert hooks
    assert set(hooks) <= set(extras["lint"])
