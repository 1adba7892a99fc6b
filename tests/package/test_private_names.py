"""The list of PyTorch's and JAX's private names is that of the sources, and the doctor reads it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from torch2jax._compat import private_names
from torch2jax._doctor import findings

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "tools" / "private_names.py").exists():
    pytest.skip("not in a source tree", allow_module_level=True)


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location(
        "private_names_tool", ROOT / "tools" / "private_names.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_what_the_sources_touch(tool: Any) -> None:
    assert tool.differences() == []


def test_the_page_is_current(tool: Any) -> None:
    """`python tools/private_names.py` writes it."""
    assert (ROOT / "docs" / "private-names.md").read_text("utf-8") == tool.page()


def test_the_scan_finds_each_kind(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_text(
        "import torch, torch._prims\n"
        "from jax._src import core as _core\n"
        "from torch._C import _x as renamed\n"
        "aten = torch.ops.aten\n"
        "def f(x):\n"
        "    aten._softmax.default, torch.ops.aten._to_copy, torch.sin\n"
        "    x._mine = getattr(x, '_theirs', None)\n"
        "    return _core.trace_state_clean(), torch.nn.Module._apply, x._mine, x._other, renamed\n"
    )
    monkeypatch.setattr(tool, "PACKAGE", tmp_path)
    names, attributes = tool.scan()
    assert set(names) == {
        *("torch._prims", "jax._src.core.trace_state_clean"),
        *("torch._C._x", "torch.nn.Module._apply"),
    }
    assert set(attributes) == {"_theirs", "_other"}


def test_all_are_there() -> None:
    assert private_names.gone() == []


def test_the_doctor_names_what_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> Any:
        (found,) = [c for c in findings.bridge() if c.name == "private names"]
        return found

    assert check().status == "ok"
    gone = {"torch._C._dropped.thing": "Does this.", "jax._src.nowhere.thing": "Does that."}
    monkeypatch.setattr(private_names, "NAMES", {**private_names.NAMES, **gone})
    monkeypatch.setattr(findings, "NAMES", private_names.NAMES)
    found = check()
    assert found.status == "warning"
    assert found.detail == (
        "gone: torch._C._dropped.thing (does this); jax._src.nowhere.thing (does that)"
    )
    assert found.remedy


def test_an_import_that_fails_names_what_has_gone() -> None:
    """An import of the package with a jax that has dropped a name says so in one line."""
    program = (
        "import jax._src.core as core\n"
        "import jax\n"
        "del core.trace_state_clean\n"
        "try:\n    import torch2jax\nexcept ImportError as e:\n    print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"does not work with jax {jax.__version__} and torch" in done.stdout, done.stderr
    assert "which lack jax._src.core.trace_state_clean." in done.stdout


def test_an_import_that_fails_otherwise_stays_itself() -> None:
    error = ImportError("libother.so is not there")
    assert private_names.explain(error) is error
