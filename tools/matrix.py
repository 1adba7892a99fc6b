"""Run the core tests on the oldest and the newest jax and torch, and on newer Pythons.

    make test-matrix                              # all of it; writes the README's table
    T2J_MATRIX_PY313=0 make test-matrix           # without Python 3.13
    make test-matrix PYTEST=tests/conversions     # these tests alone, written nowhere
    python tools/matrix.py --only oldest --output README.md   # that row alone is written anew

The two jax and the oldest torch of this Python are installed beside the environment, into
.venv-matrix, and put first on PYTHONPATH: the same binary of the package meets all of them, as it
does at a user's. Python 3.12, 3.13 and 3.14 get an environment each, with what `pip install .`
brings there: the newest jax and torch. On Linux, pip may bring a PyTorch with several GB of CUDA
libraries. T2J_MATRIX_PY312, T2J_MATRIX_PY313 and T2J_MATRIX_PY314 name the interpreter, or leave it
out with 0. Where there is none, that run is skipped, and the summary says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as xml
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from pages.page import section, write_section  # noqa: E402

FOLDER = ROOT / ".venv-matrix"

# These are about PyTorch's operators, the installer, wheels, docs and examples, or about libraries
# that want a jax of their own: their result does not depend on the version of jax. The fake GPUs
# need the headers of the PyTorch that they were written for.
NOT_CORE = (
    *("adapters", "bridge/test_fuzz.py", "bridge/test_huggingface.py", "bridge/test_operators.py"),
    *("extension/test_alias.py", "gpu", "lower/test_lowerings.py", "lower/test_models.py"),
    *("lower/test_vision.py", "package/test_build.py", "package/test_docs.py"),
    *("package/test_examples.py", "package/test_types.py", "package/test_versions.py"),
    "package/test_wheel.py",
)

# Not torch2jax, but jax 0.7 fails in these: XLA aborts the process where it compiles the twins'
# jnp.fft inside a loop or a branch, and its compiled convolution of float64 is not the eager one;
# linear_transpose of a lax.map beside constants is an assertion, with jax.numpy too; and the flax
# and the orbax of the environment need a newer jax.
OLDEST_JAX = (
    *("test_control.py and fft", "test_jvp_of_jvp and conv2d"),
    *("test_vmap_of_linearized and branch", "test_flax_nnx", "test_sharded_checkpoints"),
    *("test_remat and nnx", "test_second_derivatives_have_the_settings and mesh"),
)

# torch before 2.10 lacks what compiled=True needs, and a device made in Python, which all of these
# use. That they say so is tested in bridge/test_errors.py.
NEED_DEVICE = (
    *("compiled", "device", "lower", "torchax", "bridge/test_wide_numbers.py"),
    "conversions/test_placement.py",
)

# Of other files these need the device, too. With torch 2.6 the values of the last are right, but
# the note that it waits for does not come.
OLDEST_TORCH = (
    *("lower", "test_counting_on_the_device", "test_bridged_operators_of_the_device"),
    *("test_int32_beside_int32_of_the_function", "test_library_functions and True"),
    "test_what_refuses_int32_before_an_operator_runs",
)

CELLS = ("oldest", "oldest-torch", "newest", "python3.12", "python3.13", "python3.14")

VERSIONS = """
import importlib.metadata as m, json, platform
found = {name: m.version(name) for name in ("jax", "jaxlib", "torch", "numpy")}
import jax, torch  # what is told is what can be imported
print(json.dumps({"Python": platform.python_version(), **found}))
"""


class Cell(NamedTuple):
    """One run of the tests: an interpreter, and folders that go before its own packages."""

    label: str
    python: Path
    beside: tuple[Path, ...] = ()
    without: tuple[str, ...] = ()
    """Tests that are left out, each as pytest's ``-k`` names them."""
    without_files: tuple[str, ...] = ()


class Result(NamedTuple):
    label: str
    outcome: str
    passed: bool
    versions: dict[str, str] = {}  # noqa: RUF012
    counts: dict[str, int] = {}  # noqa: RUF012


def environment(beside: Sequence[Path] = ()) -> dict[str, str]:
    without = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return {**without, "PYTHONPATH": os.pathsep.join(map(str, beside))} if beside else without


def run(*command: str | Path, beside: Sequence[Path] = ()) -> int:
    return subprocess.run([str(c) for c in command], cwd=ROOT, env=environment(beside)).returncode


def pip(python: Path, *arguments: str | Path) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *arguments]
    if run(*command) != 0:
        sys.exit(f"pip failed: {' '.join(map(str, arguments))}")


def oldest(name: str) -> str:
    """The lower bound that the package declares, as a release."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for requirement in settings["project"]["dependencies"]:
        bound = re.fullmatch(rf"{name}\s*>=\s*([\d.]+)", requirement)
        if bound:
            return bound[1] if bound[1].count(".") > 1 else bound[1] + ".0"
    sys.exit(f"pyproject.toml declares no lower bound of {name}.")


def folder_beside(python: Path, name: str, *packages: str) -> Path:
    """The folder of this name with these packages; made where it is missing, newest always."""
    folder = FOLDER / name
    if folder.is_dir() and not name.endswith("-newest"):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    pip(python, "--target", folder, *packages)
    return folder


def jax_beside(python: Path, version: str = "") -> Path:
    """This jax (none named: the newest for this Python) and its jaxlib, nothing else."""
    packages = [f"{name}=={version}" if version else name for name in ("jax", "jaxlib")]
    return folder_beside(python, f"jax-{version or 'newest'}", "--no-deps", *packages)


def torch_beside(python: Path, version: str) -> Path:
    """This torch and what it depends on."""
    return folder_beside(python, f"torch-{version}", f"torch=={version}")


def find_python(version: str, choice: str = "") -> Path | str:
    """An interpreter of this version that runs, or the reason why there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    pattern, numbers = f"{version}.*/bin/python3", tuple(map(int, version.split(".")))
    candidates = [choice] if choice else [f"python{version}", *map(str, pyenv.glob(pattern))]
    for candidate in candidates:
        # A shim on the PATH may be there and refuse to run.
        found = shutil.which(candidate)
        check = f"import sys; sys.exit(sys.version_info[:2] != {numbers})"
        if found and subprocess.run([found, "-c", check], capture_output=True).returncode == 0:
            return Path(found)
    return f"{choice} is not Python {version}" if choice else f"no Python {version} here"


def own_environment(version: str, base: Path) -> Path:
    """An environment of this Python with the newest PyTorch and jax."""
    folder = FOLDER / f"python{version}"
    python = folder / "bin" / "python"
    if not python.exists():
        print(
            f"Python {version}: installing PyTorch, which may bring several GB of CUDA libraries",
            flush=True,
        )
        if run(base, "-m", "venv", folder) != 0:
            sys.exit(f"{base} cannot make a virtual environment.")
    pip(python, "--upgrade", "torch", "jax", "jaxlib")
    pip(python, f"{ROOT}[test]")
    return python


def test(cell: Cell, pytest_args: Sequence[str]) -> Result:
    print(f"\n== {cell.label}", flush=True)
    command = [str(cell.python), "-c", VERSIONS]
    told = subprocess.run(
        command, cwd=ROOT, env=environment(cell.beside), stdout=subprocess.PIPE, text=True
    )
    if told.returncode != 0:
        return Result(cell.label, "jax or torch cannot be imported", False)
    versions = json.loads(told.stdout)
    print(" / ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    ignored = [f"--ignore=tests/{name}" for name in (*NOT_CORE, *cell.without_files)]
    named = " and ".join(f"not ({names})" for names in cell.without)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        parallel = ["-q", "-n", "2", "--dist", "loadfile", f"--junit-xml={report}"]
        options = [*parallel, *ignored, *(["-k", named] if named else []), *pytest_args]
        status = run(cell.python, "-m", "pytest", *options, beside=cell.beside)
        counts = counts_of(report)
    outcome = "passed" if status == 0 else f"failed (pytest's exit status {status})"
    outcome += f" in {time.monotonic() - started:.0f} s"
    return Result(cell.label, outcome, status == 0, versions, counts)


def counts_of(report: Path) -> dict[str, int]:
    """How many tests passed, failed and were skipped; empty where pytest did not get to it."""
    if not report.exists():
        return {}
    suites = list(xml.parse(report).getroot().iter("testsuite"))
    total, failed, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    )
    return {
        "passed": total - failed - errors - skipped,
        "failed": failed + errors,
        "skipped": skipped,
    }


def markdown(results: Sequence[Result], written: str) -> str:
    """The README's table: what was run, and nothing else. Rows of other cells stay as written."""
    heads = ["", "run", "Python", "jax", "jaxlib", "torch", "numpy", "passed", "failed", "skipped"]
    lines = [heads, ["---"] * 7 + ["---:"] * 3]
    rows = {cells[0]: cells for cells in map(_cells, re.findall(r"^\| \w.*\|$", written, re.M))}
    for r in results:
        counts = {name: f"{n:,}" for name, n in r.counts.items()}
        cells = {"": r.label, "run": str(datetime.date.today()), **r.versions, **counts}
        if counts:
            rows[r.label] = [cells.get(head, "-") for head in heads]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, *rows.values()])


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def newer_python(version: str) -> Cell | Result:
    """The newest jax and torch on this Python, and the package built there."""
    label, variable = (
        f"Python {version}, nothing pinned",
        f"T2J_MATRIX_PY{version.replace('.', '')}",
    )
    choice = os.environ.get(variable, "")
    found = f"{variable}=0" if choice == "0" else find_python(version, choice)
    if not isinstance(found, Path):
        return Result(label, f"SKIPPED: {found}", True)
    return Cell(label, own_environment(version, found))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="write into the table of FILE")
    parser.add_argument("--only", choices=CELLS, help="one row of the table")
    parser.add_argument("pytest_args", nargs="*", metavar="-- PYTEST ARGUMENTS")
    arguments = parser.parse_args()

    here = Path(sys.executable)  # not resolved: the link is what makes it the environment's Python
    name = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    jax, torch = oldest("jax"), oldest("torch")
    make: dict[str, Callable[[], Cell | Result]] = {
        "oldest": lambda: Cell(
            f"{name}, oldest jax", here, (jax_beside(here, jax),), without=OLDEST_JAX
        ),
        "oldest-torch": lambda: Cell(
            f"{name}, oldest jax and torch",
            here,
            (torch_beside(here, torch), jax_beside(here, jax)),
            without=(*OLDEST_JAX, *OLDEST_TORCH),
            without_files=NEED_DEVICE,
        ),
        "newest": lambda: Cell(f"{name}, newest jax", here, (jax_beside(here),)),
        "python3.12": lambda: newer_python("3.12"),
        "python3.13": lambda: newer_python("3.13"),
        "python3.14": lambda: newer_python("3.14"),
    }
    cells = [make[each]() for each in ([arguments.only] if arguments.only else CELLS)]
    results = [c if isinstance(c, Result) else test(c, arguments.pytest_args) for c in cells]

    print("\n== The matrix")
    for result in results:
        print(f"{result.label:<32} {result.outcome}")
    page = arguments.output
    written = section(page, "versions") if page else ""
    text = markdown(results, written)
    print(f"\n{text}")
    if page:
        write_section(page, text, "versions")
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
