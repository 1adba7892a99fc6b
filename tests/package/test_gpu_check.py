"""`make gpu-check` without a GPU: one part of its rehearsal, and the page that it writes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks" / "programs" / "gpu.py"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program as a module. It finds the other benchmarks by the path that it sets."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu_check", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_part_is_rehearsed() -> None:
    command = [sys.executable, str(PROGRAM), "--rehearse", "--only", "nested"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "right   jax2torch inside of a call" in done.stdout


def test_without_a_gpu_nothing_is_written() -> None:
    before = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Nothing was run" in done.stdout
    assert (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8") == before


@pytest.mark.parametrize("rehearse", [False, True])
def test_the_page_is_a_file_that_can_be_taken_away(
    program: Any, rehearse: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "docs.md"
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    monkeypatch.setattr(program, "PAGE", page)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    copy = program.written("all was right", rehearse)
    assert copy.parent == tmp_path / "out"
    assert "all was right" in copy.read_text(encoding="utf-8")
    assert (page.read_text(encoding="utf-8") == text) is rehearse


def test_every_setting_names_a_part(program: Any) -> None:
    for names in (program.LIMITS, program.MAY_HANG, program.PREALLOCATING):
        assert set(names) <= set(program.PARTS)
    for name in program.TESTS:
        assert (ROOT / "tests" / name).exists()
    for name in program.EXAMPLES:
        assert (ROOT / "examples" / f"{name}.py").exists()
    assert program.REHEARSED[1] in program.EXAMPLES
    assert (ROOT / "tests" / program.REHEARSED[0]).exists()


def test_what_hangs_is_ended(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    environments: dict[str, Any] = {}

    def run(command: list[str], **options: Any) -> Any:
        environments[command[-1]] = options["env"]
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    verdicts = {name: program.in_process(name, 1)[0].verdict for name in program.PARTS}
    assert {name for name, verdict in verdicts.items() if verdict == "-"} == program.MAY_HANG
    assert {v for n, v in verdicts.items() if n not in program.MAY_HANG} == {"FAILED"}
    default = {n for n, e in environments.items() if "XLA_PYTHON_CLIENT_PREALLOCATE" not in e}
    assert default == program.PREALLOCATING
