"""The checks and benchmarks that need an NVIDIA GPU, in one command of at most 8 minutes.

    make gpu-check                         # with a GPU, torch and jax; fetches nothing
    python benchmarks/programs/gpu.py --rehearse    # without: all of it in short, on a CPU

Builds the package from this tree without isolation (or installs the wheel that is in dist/), runs
each part below in a process of its own, then examples and the tests that can run on the GPU, if
what they import is there, and writes the section of docs/gpu.md. The whole page is also a file in
$OUT, or in build/, and the last line names it. Ends with status 1 where something failed, and with
2, before anything is done, where there is no GPU. A rehearsal leaves docs/gpu.md as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages.page import measured, table, write_section
from subjects.gpu_checks import LIMITS, MAY_HANG, PARTS, PREALLOCATING

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gpu.md"
FOLDER = ROOT / "build" / "gpu"
LIMIT_S = 460
"""For all; the limit is 8 minutes."""
PART_S = 150
SETTINGS = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # all allocators share the GPU
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # a float32 product is one, as PyTorch's are
}
TESTS = (
    "conversions",
    "transforms/test_grad.py",
    "transforms/test_vmap.py",
    "transforms/test_jvp.py",
    "bridge/test_random.py",
    "bridge/tape",
)
"""As many of them as there is time for."""
EXAMPLES = ("jax_in_pytorch", "custom_operator", "gpt_on_jax", "train_digits", "ode_layer")
"""As many of them, in short, as there is time for, and whose imports are there."""
REHEARSED = ("conversions/test_values.py", "custom_operator")
"""The tests and the example of a rehearsal."""


class Line(NamedTuple):
    """One of the page's table."""

    what: str
    found: str
    verdict: str


def run_part(name: str) -> list[Line]:
    lines = []
    for check in PARTS[name]:
        try:
            lines += [Line(what, found, "right") for what, found in check().items()]
        except Exception as error:
            traceback.print_exc()
            reason = " ".join(str(error).strip().splitlines()[:1])
            title = check.__name__.replace("_", " ")
            lines.append(Line(title, f"{type(error).__name__}: {reason}", "FAILED"))
    return lines


def in_process(name: str, seconds: float) -> list[Line]:
    command = [sys.executable, __file__, "--part", name]
    environment = dict(os.environ)
    if name in PREALLOCATING:
        del environment["XLA_PYTHON_CLIENT_PREALLOCATE"]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        if name in MAY_HANG:
            return [
                Line(name, f"hangs, as the documentation says: ended after {seconds:.0f} s", "-")
            ]
        return [Line(name, f"not done after {seconds:.0f} s", "FAILED")]
    if done.returncode != 0:
        return [Line(name, f"the process ended with status {done.returncode}", "FAILED")]
    return [Line(*line) for line in json.loads(done.stdout.splitlines()[-1])]


def tests(name: str, seconds: float) -> Line:
    """Tests whose arrays are on jax's default device, which is the GPU. Warnings are warnings."""
    title = f"tests/{name}"
    if importlib.util.find_spec("pytest") is None:
        return Line(title, "not run: pytest is not installed", "-")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-o", "filterwarnings=default", title]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Line(title, f"not done after {seconds:.0f} s", "-")
    print(done.stdout[-4000:])
    said = (done.stdout.strip().splitlines() or ["nothing"])[-1].strip("= ")
    return Line(title, said, "right" if done.returncode == 0 else "FAILED")


def example(name: str, seconds: float) -> Line:
    """An example in its short form."""
    title = f"examples/{name}.py"
    script = ROOT / "examples" / f"{name}.py"
    roots = re.findall(r"^(?:import|from) (\w+)", script.read_text(encoding="utf-8"), re.M)
    absent = sorted({root for root in roots if importlib.util.find_spec(root) is None} - _OURS)
    if absent:
        return Line(title, f"not run: {', '.join(absent)} is not installed", "-")
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, str(script), "--smoke"],
                cwd=folder, stdout=subprocess.PIPE, text=True, timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Line(title, f"not done after {seconds:.0f} s", "-")
    if done.returncode != 0:
        return Line(title, f"ended with status {done.returncode}", "FAILED")
    return Line(title, "ran to its end", "right")


_OURS = {"torch2jax"}
"""``install`` puts it where the children of this process find it."""


def no_gpu() -> str | None:
    """Why nothing can be run here."""
    try:
        import jax
        import torch
    except ImportError as error:
        return f"{sys.executable}: {error}. PYTHON= names a Python that has torch and jax"
    missing = []
    if not torch.cuda.is_available():
        missing.append(f"torch {torch.__version__} sees no NVIDIA GPU")
    if not any(d.platform == "gpu" for d in jax.devices()):
        missing.append(f"jax {jax.__version__} sees only {jax.default_backend()}")
    return "; ".join(missing) or None


def install() -> None:
    """The package into build/gpu, without the network; this process's children import it."""
    os.environ["PYTHONPATH"] = str(FOLDER)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--upgrade"]
    options = ["--disable-pip-version-check", "--quiet", "--target", str(FOLDER)]
    source = subprocess.run([*pip, *options, "--no-build-isolation", str(ROOT)])
    if source.returncode == 0:
        return
    print("The source does not build here (see above): trying the wheels in dist/.")
    for wheel in sorted((ROOT / "dist").glob("*.whl")):
        if subprocess.run([*pip, *options, str(wheel)]).returncode == 0:
            return
    raise SystemExit(
        "No build and no wheel that fits. A build without isolation needs scikit-build-core, "
        "nanobind, cmake and ninja; `make wheel` on another machine puts wheels into dist/."
    )


def versions() -> dict[str, str]:
    import jax
    import torch

    found = {name: version(name) for name in ("jax", "jaxlib", "torch")}
    found["python"] = ".".join(map(str, sys.version_info[:3]))
    if torch.cuda.is_available():
        driver = jax.devices()[0].client.platform_version.replace("\n", " ")
        found |= {"CUDA": str(torch.version.cuda), "GPU": torch.cuda.get_device_name()}
        found["platform"] = driver.removeprefix("PJRT C API ").strip()
    return found


def everything(rehearse: bool, deadline: float) -> Iterator[Line]:
    work: list[tuple[str, Callable[[str, float], list[Line]]]] = []
    work += [(name, in_process) for name in PARTS]
    chosen = [name for name in EXAMPLES if not rehearse or name in REHEARSED]
    work += [(name, lambda name, left: [example(name, left)]) for name in chosen]
    chosen = [REHEARSED[0]] if rehearse else [*TESTS]
    work += [(name, lambda name, left: [tests(name, left)]) for name in chosen]
    for name, run in work:
        left = deadline - time.monotonic()
        if left < 20:
            yield Line(name, "not run: no time was left", "FAILED" if name in PARTS else "-")
        else:
            limit = LIMITS.get(name, PART_S if name in PARTS else left)
            yield from run(name, left if rehearse else min(left, limit))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in short")
    parser.add_argument("--only", choices=list(PARTS), help="this part alone; the page stays")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(run_part(arguments.part)))
        return 0
    os.environ.update(SETTINGS)
    started, load = time.monotonic(), os.getloadavg()[0]
    if not arguments.rehearse and (reason := no_gpu()):
        print(f"gpu-check: {reason}.\nNothing was run, and docs/gpu.md is as it was.")
        return 2
    if not arguments.rehearse:
        install()
    limit = 4 * LIMIT_S if arguments.rehearse else LIMIT_S
    if arguments.only:
        found: Iterable[Line] = in_process(arguments.only, limit)
    else:
        found = everything(arguments.rehearse, started + limit)
    lines = []
    for line in found:
        print(f"{line.verdict:<7} {line.what}: {line.found}", flush=True)
        lines.append(line)
    failed = any(line.verdict == "FAILED" for line in lines)
    if not arguments.only:
        seconds = time.monotonic() - started
        text = f"{measured(load, versions())}\nAll of it took {seconds:.0f} s.\n\n"
        text += table(["check", "found", "verdict"], [[_cell(x) for x in line] for line in lines])
        print(f"Written: {written(text, arguments.rehearse)}")
    return int(failed)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def written(text: str, rehearse: bool) -> Path:
    """The page with the text as its section, as a file that can be taken away."""
    folder = Path(os.environ.get("OUT") or ROOT / "build")
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / ("gpu-rehearsal.md" if rehearse else "gpu.md")
    if not rehearse:
        write_section(PAGE, text, "gpu")
    shutil.copy(PAGE, copy)
    if rehearse:
        write_section(copy, f"**A rehearsal on a CPU.** {text}", "gpu")
    return copy


if __name__ == "__main__":
    sys.exit(main())
