"""Run the core tests on the oldest and the newest supported jax, and on Python 3.13.

    make test-matrix                              # all of it
    T2J_MATRIX_PY313=0 make test-matrix           # without Python 3.13
    make test-matrix PYTEST=tests/test_convert.py

The two jax of this Python are installed beside the environment, into .venv-matrix, and put first
on PYTHONPATH: the same binary of the package meets both, as it does at a user's. Python 3.13 gets
an environment of its own and builds the package there; on Linux, pip may bring a PyTorch with
several GB of CUDA libraries into it. T2J_MATRIX_PY313 names the interpreter, or leaves it out with
0. Where there is none, that run is skipped, and the summary says so.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-matrix"

# These are about PyTorch's operators, the installer and the examples: their result does not depend
# on the version of jax, or they need the libraries of the demo.
NOT_CORE = ("test_ops.py", "test_alias.py", "test_examples.py")


class Cell(NamedTuple):
    """One run of the tests: an interpreter, and a folder that goes before its own packages."""

    label: str
    python: Path
    beside: Path | None = None


class Result(NamedTuple):
    label: str
    outcome: str
    passed: bool


def run(*command: str | Path, beside: Path | None = None) -> int:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if beside is not None:
        environment["PYTHONPATH"] = str(beside)
    return subprocess.run([str(c) for c in command], cwd=ROOT, env=environment).returncode


def pip(python: Path, *arguments: str | Path) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *arguments]
    if run(*command) != 0:
        sys.exit(f"pip failed: {' '.join(map(str, arguments))}")


def oldest_jax() -> str:
    """The lower bound that the package declares."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for requirement in settings["project"]["dependencies"]:
        bound = re.fullmatch(r"jax\s*>=\s*([\d.]+)", requirement)
        if bound:
            return bound[1] if bound[1].count(".") > 1 else bound[1] + ".0"
    sys.exit("pyproject.toml declares no lower bound of jax.")


def jax_beside(python: Path, version: str | None) -> Path:
    """A folder with this jax (None: the newest for this Python) and its jaxlib, nothing else."""
    folder = FOLDER / f"jax-{version or 'newest'}"
    if version is not None and folder.is_dir():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    pin = f"=={version}" if version else ""
    pip(python, "--no-deps", "--target", folder, f"jax{pin}", f"jaxlib{pin}")
    return folder


def find_python313() -> Path | str:
    """A Python 3.13 that runs, or the reason why there is none."""
    choice = os.environ.get("T2J_MATRIX_PY313", "")
    if choice == "0":
        return "T2J_MATRIX_PY313=0"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [choice] if choice else ["python3.13", *map(str, pyenv.glob("3.13*/bin/python3"))]
    for candidate in candidates:
        # A shim on the PATH may be there and refuse to run.
        found = shutil.which(candidate)
        if found and run(found, "-c", "import sys; sys.exit(sys.version_info[:2] != (3, 13))") == 0:
            return Path(found)
    return f"{choice} is not Python 3.13" if choice else "no such interpreter here"


def python313_environment(base: Path, torch: str) -> Path:
    """An environment of Python 3.13 with the newest jax and the package as it is now."""
    folder = FOLDER / "python3.13"
    python = folder / "bin" / "python"
    if not python.exists():
        print(
            "Python 3.13: installing PyTorch, which may bring several GB of CUDA libraries",
            flush=True,
        )
        if run(base, "-m", "venv", folder) != 0:
            sys.exit(f"{base} cannot make a virtual environment.")
        pip(python, torch)
    pip(python, "--upgrade", "jax", "jaxlib")
    pip(python, f"{ROOT}[test]")
    return python


def test(cell: Cell, pytest_args: Sequence[str]) -> Result:
    versions = (
        "import sys, jax, jaxlib, torch;"
        "print('Python', sys.version.split()[0], '/ jax', jax.__version__,"
        " '/ jaxlib', jaxlib.__version__, '/ torch', torch.__version__)"
    )
    print(f"\n== {cell.label}", flush=True)
    if run(cell.python, "-c", versions, beside=cell.beside) != 0:
        return Result(cell.label, "jax or torch cannot be imported", False)
    ignored = [f"--ignore=tests/{name}" for name in NOT_CORE]
    started = time.monotonic()
    status = run(cell.python, "-m", "pytest", "-q", *ignored, *pytest_args, beside=cell.beside)
    outcome = "passed" if status == 0 else f"failed (pytest's exit status {status})"
    return Result(cell.label, f"{outcome} in {time.monotonic() - started:.0f} s", status == 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--torch", default="torch", help="the PyTorch for Python 3.13")
    parser.add_argument("pytest_args", nargs="*", metavar="-- PYTEST ARGUMENTS")
    arguments = parser.parse_args()

    here = Path(sys.executable)  # not resolved: the link is what makes it the environment's Python
    name = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    oldest = oldest_jax()
    results = [
        test(Cell(f"{name}, jax {oldest}", here, jax_beside(here, oldest)), arguments.pytest_args),
        test(Cell(f"{name}, newest jax", here, jax_beside(here, None)), arguments.pytest_args),
    ]
    found = find_python313()
    if isinstance(found, Path):
        python = python313_environment(found, arguments.torch)
        results.append(test(Cell("Python 3.13, newest jax", python), arguments.pytest_args))
    else:
        results.append(Result("Python 3.13, newest jax", f"SKIPPED: {found}", True))

    print("\n== The matrix")
    for result in results:
        print(f"{result.label:<26} {result.outcome}")
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
