"""Build the extension with sanitizers, in build/, and run tests on it. Linux, with GCC.

python tools/sanitize.py address    # memory, undefined behaviour, leaks; injected faults
python tools/sanitize.py thread     # ThreadSanitizer
python tools/sanitize.py --headers FOLDER thread -- -x tests/bridge/test_stress.py

Python, PyTorch and JAX are not built with them. So the sanitizer's runtime is loaded before Python
(LD_PRELOAD), and leaks and races count where our own code allocated the memory or touched it: what
Python keeps until it ends is no leak of ours, and a lock of XLA or PyTorch that is no pthread mutex
is out of ThreadSanitizer's sight. Exits with 1 where a test fails or a report counts.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = ROOT / "tools" / "sanitized"
"""Holds the sitecustomize.py that makes Python import the extension which was built."""

SANITIZERS = {"address": "address,undefined", "thread": "thread"}
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
TESTS = {
    "address": [
        *("tests/helpers/injected.py", "tests/extension/test_extension.py"),
        *("tests/bridge/test_stress.py", "tests/jax2torch/test_calls.py"),
        "tests/device/test_operators.py",
        # It is about glibc's malloc, in whose place the sanitizer's is.
        "--deselect=tests/extension/test_extension.py::test_large_results_take_no_fresh_pages",
    ],
    "thread": [
        "tests/helpers/injected.py::test_the_registry_without_the_gil",
        "tests/bridge/test_stress.py",
        "tests/extension/test_extension.py::test_threads",
    ],
}


def run(*command: str | Path, **environment: str) -> int:
    return subprocess.run(
        [str(c) for c in command], cwd=ROOT, env={**os.environ, **environment}, check=False
    ).returncode


def build(kind: str, folder: Path, headers: str | None) -> Path:
    """The extension. `headers`: a folder that holds a jaxlib, whose FFI headers are used."""
    # cmake and ninja may be in the environment's own folder.
    environment = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if headers:
        environment["PYTHONPATH"] = headers
    options = {
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",
        "Python_EXECUTABLE": sys.executable,
        "T2J_SANITIZE": SANITIZERS[kind],
        "T2J_TESTING": "ON",
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    for command in (
        ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *definitions],
        ["cmake", "--build", folder],
    ):
        if run(*command, **environment) != 0:
            sys.exit(f"the build failed: {' '.join(map(str, command))}")
    [extension] = folder.glob("_ext*.so")
    return extension


def library(name: str) -> str:
    """The file of a library of the compiler."""
    found = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        sys.exit(f"g++ has no {name}: install the compiler's sanitizer libraries.")
    return found


def environment(kind: str, extension: Path, logs: Path) -> dict[str, str]:
    """What a process and its children need."""
    # Each frame names its library, by which reports() knows our own.
    common = f"log_path={logs}/log:stack_trace_format='    #%n %p in %f %S (%m)'"
    options = {
        # Leaks of others are many, so none of them sets a status here: see reports().
        "ASAN_OPTIONS": f"{common}:exitcode=0:abort_on_error=1:malloc_context_size=16"
        ":allocator_may_return_null=1:detect_leaks=1",
        "UBSAN_OPTIONS": f"{common}:print_stacktrace=1:halt_on_error=0",
        "TSAN_OPTIONS": f"{common}:exitcode=0:ignore_noninstrumented_modules=1:history_size=4"
        ":report_thread_leaks=0",
    }
    return {
        **options,
        # libstdc++ too: its exceptions are intercepted, and Python does not load it by itself.
        "LD_PRELOAD": f"{library(RUNTIMES[kind])} {library('libstdc++.so.6')}",
        # Each of Python's objects is an allocation that the sanitizer sees.
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": f"{PRELOADED}:{os.environ.get('PYTHONPATH', '')}",
        "T2J_EXTENSION": str(extension),
    }


_RUNTIME_FRAME = re.compile(r"lib(asan|tsan|ubsan|stdc\+\+)\.so|<null>")


def reports(logs: Path, extension: Path) -> Iterator[str]:
    """What the sanitizers wrote: all of it, but of leaks only what our code allocated."""
    for log in sorted(logs.iterdir()):
        text = log.read_text(errors="replace")
        if "LeakSanitizer: detected memory leaks" not in text:
            yield text
            continue
        before, _, leaks = text.partition("LeakSanitizer: detected memory leaks")
        if "ERROR" in before.rpartition("\n")[0] or "runtime error" in before:
            yield before
        for leak in re.split(r"\n\s*\n", leaks):
            frames = [line for line in leak.splitlines() if re.match(r"\s+#\d+ ", line)]
            allocator = next((f for f in frames if not _RUNTIME_FRAME.search(f)), "")
            if extension.name in allocator:
                yield f"{log.name}: {leak.strip()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=SANITIZERS)
    parser.add_argument("--headers", help="a folder with a jaxlib to build against")
    parser.add_argument("pytest_args", nargs="*", metavar="-- PYTEST ARGUMENTS")
    arguments = parser.parse_args()

    folder = ROOT / "build" / arguments.kind
    extension = build(arguments.kind, folder, arguments.headers)
    logs = folder / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    tests = arguments.pytest_args
    if not any(each.startswith("tests/") for each in tests):
        tests = [*TESTS[arguments.kind], *tests]
    status = run(
        sys.executable,
        *("-X", "faulthandler", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests),
        **environment(arguments.kind, extension, logs),
    )
    found = list(reports(logs, extension))
    for report in found:
        print(report, flush=True)
    print(f"{arguments.kind}: {len(found)} reports; the tests' status is {status}")
    return int(bool(found) or status != 0)


if __name__ == "__main__":
    sys.exit(main())
