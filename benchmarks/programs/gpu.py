"""The checks and benchmarks that need an NVIDIA GPU, in one command of at most 8 minutes.

    make gpu-check                         # with a GPU, torch and jax; fetches nothing
    python benchmarks/programs/gpu.py --rehearse    # without: what a CPU can run, written nowhere

Builds the package from this tree without isolation (or installs the wheel that is in dist/), runs
each part below in a process of its own, then the tests that can run on the GPU, if pytest is there,
and writes the section of docs/gpu.md. Ends with status 1 where something failed, and with 2,
before anything is done, where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages.page import measured, table, write_section
from subjects.gpu_checks import NEED_A_GPU, PARTS

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
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [Line(name, f"not done after {seconds:.0f} s", "FAILED")]
    if done.returncode != 0:
        return [Line(name, f"the process ended with status {done.returncode}", "FAILED")]
    return [Line(*line) for line in json.loads(done.stdout.splitlines()[-1])]


def tests(name: str, seconds: float) -> Line:
    """Tests whose arrays are on jax's default device, which is the GPU."""
    if importlib.util.find_spec("pytest") is None:
        return Line(name, "not run: pytest is not installed", "-")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{name}"]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Line(name, f"not done after {seconds:.0f} s", "-")
    print(done.stdout[-4000:])
    said = (done.stdout.strip().splitlines() or ["nothing"])[-1].strip("= ")
    return Line(name, said, "right" if done.returncode == 0 else "FAILED")


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


def all_parts(rehearse: bool, deadline: float) -> Iterator[Line]:
    for name in (*PARTS, *(() if rehearse else TESTS)):
        left = deadline - time.monotonic()
        if rehearse and name in NEED_A_GPU:
            yield Line(name, "needs a GPU", "-")
        elif left < 20:
            yield Line(name, "not run: no time was left", "FAILED" if name in PARTS else "-")
        elif name in PARTS:
            yield from in_process(name, left if rehearse else min(left, PART_S))
        else:
            yield tests(name, left)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, written nowhere")
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
    lines = []
    limit = 4 * LIMIT_S if arguments.rehearse else LIMIT_S
    for line in all_parts(arguments.rehearse, started + limit):
        print(f"{line.verdict:<7} {line.what}: {line.found}", flush=True)
        lines.append(line)
    seconds = time.monotonic() - started
    text = f"{measured(load, versions())}\nAll of it took {seconds:.0f} s.\n\n"
    text += table(["check", "found", "verdict"], lines)
    if arguments.rehearse:
        print(f"\n{text}")
    else:
        write_section(PAGE, text, "gpu")
        print(f"\nWritten to {PAGE.relative_to(ROOT)}.")
    return int(any(line.verdict == "FAILED" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
