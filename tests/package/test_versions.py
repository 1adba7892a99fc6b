"""The README says which versions are supported, and its table has those that are installed."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "tools").exists():
    pytest.skip("not in a source tree", allow_module_level=True)

README = (ROOT / "README.md").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture
def newest() -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("newest")
    finally:
        sys.path.remove(str(ROOT / "tools"))


TABLE = """
<!-- versions: begin -->
|  | run | Python | jax | torch | passed |
| --- | --- | --- | --- | --- | ---: |
| oldest | 2026-11-21 | 3.11.7 | 0.7.0 | 2.13.0+cpu | 7,669 |
| newest | 2026-11-21 | 3.13.0 | 0.12.0.1 | 2.9.1 | 7,812 |
<!-- versions: end -->
"""


def test_the_table_has_what_is_installed(newest: Any) -> None:
    """A new release of PyTorch or JAX fails here until the matrix has met it."""
    assert not newest.untested(README, newest.installed)


@pytest.mark.parametrize(
    ("torch", "jax", "told"),
    [
        ("2.13.0", "0.12.0.1", []),
        ("2.6.0+cu124", "0.7.2", []),
        ("2.14.0", "0.12.0", ["torch 2.14.0 is newer than 2.13.0+cpu"]),
        ("2.13.1+cpu", "0.12.0", ["torch 2.13.1+cpu is newer than 2.13.0+cpu"]),
        ("3", "0.12.1", ["torch 3 is newer than 2.13.0", "jax 0.12.1 is newer than 0.12.0.1"]),
    ],
)
def test_a_newer_release_is_told(newest: Any, torch: str, jax: str, told: list[str]) -> None:
    found = newest.untested(TABLE, {"torch": torch, "jax": jax}.__getitem__)
    assert len(found) == len(told)
    for sentence, begin in zip(found, told, strict=True):
        assert sentence.startswith(begin)


def test_a_readme_without_its_table_is_refused(newest: Any) -> None:
    with pytest.raises(SystemExit, match="no table of versions"):
        newest.tested("# torch2jax\n")


def test_pip_is_asked_for_the_newest(newest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        returncode = 0
        stdout = "torch (2.14.0)\nAvailable versions: 2.14.0, 2.13.0\n"

    monkeypatch.setattr(newest.subprocess, "run", lambda *args, **kwargs: Done)
    assert newest.offered("torch") == "2.14.0"
    Done.stdout = "ERROR: No matching distribution found for torch"
    with pytest.raises(SystemExit, match="pip does not say"):
        newest.offered("torch")


def test_the_policy_is_that_of_the_package() -> None:
    """README, the page on installing and pyproject.toml name the same lower bounds."""
    bounds = dict(re.findall(r"^(\w+)>=([\d.]+)$", "\n".join(PROJECT["dependencies"]), re.M))
    policy = README.partition("## Versions")[2]
    rows = dict(re.findall(r"^\| (Python|JAX|PyTorch) \| ([\d.]+) or later", policy, re.M))
    python = PROJECT["requires-python"].removeprefix(">=")
    assert rows == {"Python": python, "JAX": bounds["jax"], "PyTorch": bounds["torch"]}
    sentence = f"PyTorch {bounds['torch']} or later and JAX {bounds['jax']} or later"
    for page in (README, (ROOT / "docs" / "getting-started.md").read_text("utf-8")):
        assert sentence in " ".join(page.split())
