"""The examples run, and so does the code in the README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(*command: str, cwd: Path) -> str:
    environment = {**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_train_digits(tmp_path: Path) -> None:
    for library in ("sklearn", "optax", "rich", "matplotlib"):
        pytest.importorskip(
            library, reason="the extra `demo` is not installed", exc_type=ImportError
        )
    picture = tmp_path / "digits.png"
    script = str(ROOT / "examples" / "train_digits.py")
    printed = run(
        "-W", "error::UserWarning", script, "--smoke", "--output", str(picture), cwd=tmp_path
    )
    assert "Test accuracy" in printed
    assert "native PyTorch" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_jax_in_pytorch(tmp_path: Path) -> None:
    printed = run(str(ROOT / "examples" / "jax_in_pytorch.py"), "--smoke", cwd=tmp_path)
    assert "ms an update" in printed


def test_readme_has_code() -> None:
    assert BLOCKS


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_code_runs(number: int, tmp_path: Path) -> None:
    """Each block stands alone: a reader copies one."""
    run("-c", BLOCKS[number], cwd=tmp_path)
