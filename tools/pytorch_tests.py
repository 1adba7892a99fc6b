"""PyTorch's own tests for devices, run on device "jax": a table of what passes and what fails.

    python tools/pytorch_tests.py ~/pytorch/test                         # every 10th test
    python tools/pytorch_tests.py ~/pytorch/test --share 1 --only test_view_ops.py
    python tools/pytorch_tests.py ~/pytorch/test --again                 # those that failed there
    python tools/pytorch_tests.py ~/pytorch/test --quick                 # without optimizations
    python tools/pytorch_tests.py ~/pytorch/test --table                 # the table of a run

The folder is `test` of PyTorch's sources. Each test runs on the CPU first: one that fails or is
skipped there is not a test of the installed PyTorch and is left out. One file runs in one process
at a time; a process that crashes or hangs loses one test, and another one goes on with the rest.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import unittest
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytorch_limits import LIMITS

FILES = (
    *("test_torch.py", "test_view_ops.py", "test_indexing.py", "test_binary_ufuncs.py"),
    *("test_unary_ufuncs.py", "test_reductions.py", "test_shape_ops.py"),
    *("test_tensor_creation_ops.py", "test_sort_and_select.py", "test_scatter_gather_ops.py"),
    *("test_type_promotion.py", "test_linalg.py", "test_nn.py", "test_autograd.py"),
    *("test_segment_reductions.py", "test_spectral_ops.py", "nn/test_convolution.py"),
    *("nn/test_dropout.py", "nn/test_embedding.py", "nn/test_pooling.py"),
    *("nn/test_multihead_attention.py", "nn/test_packed_sequence.py"),
)
_GONE: dict[str, Callable[[Any], Any]] = {
    "tf32_is_not_fp32": lambda _: lambda: True,
    "bf32_on_and_off": lambda _: lambda *args: lambda test: test,
    "binary_ufuncs_and_refs": lambda ops: ops.binary_ufuncs,
    "new_module_tests": lambda _: [],
}
"""What test files of PyTorch 2.6 import and 2.13 does not have any more: what stands for it, of the
module in which it was."""
GRACE = 120.0
"""A test that takes ten times its limit and so many seconds by the clock is ended with its process,
because C++ cannot be interrupted."""


# --- the process that runs tests of one file -----------------------------------------------------


class _TooSlow(BaseException):
    pass


def _late(*_: Any) -> None:
    raise _TooSlow


def _import(path: Path) -> Any:
    """Import a test file with device "jax" beside the CPU among its devices."""
    import jax
    import torch

    import torch2jax.device

    jax.config.update("jax_enable_x64", True)
    torch.set_num_threads(1)
    torch2jax.device.enable()
    torch.jax.is_available = lambda: True  # type: ignore[attr-defined]
    from torch.testing._internal import common_device_type as common

    class JaxTestBase(common.PrivateUse1TestBase):
        device_type = "jax"

    common.device_type_test_bases[:] = [common.CPUTestBase, JaxTestBase]
    sys.path[:0] = [str(path.parent), str(path.parents[1])]
    sys.argv[1:] = []  # the test files read it
    os.chdir(path.parent)
    while True:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        try:
            # So 2.6 wrote it; a class that is derived further calls itself by this for ever.
            text = path.read_text().replace("super(self.__class__, self)", "super()")
            exec(compile(text, path, "exec"), vars(module))
        except ImportError as error:  # the file is of another version than the installed one
            missing = re.match(r"cannot import name '(\w+)' from '([\w.]+)'", str(error))
            if missing is None or missing[1] not in _GONE:
                raise
            there = sys.modules[missing[2]]
            setattr(there, missing[1], _GONE[missing[1]](there))
        else:
            return module


def _tests(module: Any) -> dict[str, tuple[Any, str, Any, str]]:
    """Return each test of device "jax" by its name, with its twin of the CPU."""
    found = {}
    for name, case in sorted(vars(module).items()):
        if not (isinstance(case, type) and name.endswith("JAX")):
            continue
        twin = getattr(module, f"{name[:-3]}CPU", None)
        for test in sorted(unittest.TestLoader().getTestCaseNames(case)):
            there = re.sub(r"_jax(_|$)", r"_cpu\1", test, count=1)
            if twin is not None and hasattr(twin, there):
                found[f"{name[:-3]}.{test}"] = (case, test, twin, there)
    return found


def _run(case: Any, name: str, limit: float) -> tuple[str, str, float]:
    """Run one test; return what became of it, the last line of an error, and its CPU seconds."""
    start = time.process_time()
    result = unittest.TestResult()
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        unittest.TestSuite([case(name)]).run(result)
    except _TooSlow:
        return "slow", f"more than {limit:g} s", time.process_time() - start
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {error}"[:400], time.process_time() - start
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - start
    wrong = [*result.errors, *result.failures]
    if wrong and "_TooSlow" in wrong[0][1]:
        return "slow", f"more than {limit:g} s", seconds
    if wrong:
        return "failed", _said(wrong[0][1]), seconds
    if result.skipped:
        return "skipped", result.skipped[0][1], seconds
    return "passed", "", seconds


def _said(trace: str) -> str:
    """Return the error of a traceback, without PyTorch's advice how to run the test again."""
    text = trace.split("\nTo execute this test")[0].strip()
    start = [m.start() for m in re.finditer(r"^\S*(Error|Exception|Skip\w*)\b.*", text, re.M)]
    lines = [x for x in text.splitlines() if ", line " in x and "torch/testing" not in x]
    place = lines[-1].strip().rpartition("/")[2] if lines else ""
    return f"{text[start[-1] :] if start else text[-300:]}"[:600] + f" [{place}]"


def worker(path: Path, choice: dict[str, Any], limit: float, output: Path, quick: bool) -> None:
    """Run tests of a file one after the other, and write a line of JSON for each."""
    if quick:  # most of a test's time is that of compiling
        sys.path.append(str(Path(__file__).parents[1] / "tests/helpers"))
        from compiling import quickly

        quickly().__enter__()
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGPROF, _late)
    tests = _tests(_import(path))
    names = choice["names"] if "names" in choice else _chosen(sorted(tests), **choice)
    with output.open("a") as file:

        def say(row: dict[str, Any]) -> None:
            print(json.dumps(row), file=file, flush=True)

        say({"chosen": names})
        for name in names:
            case, here, twin, there = tests[name]
            say({"begin": name})
            status, text, seconds = _run(twin, there, limit)
            row = {"name": name, "cpu": status, "cpu_seconds": round(seconds, 3)}
            if status == "passed":
                status, text, seconds = _run(case, here, limit)
                row |= {"jax": status, "seconds": round(seconds, 3), "text": text}
            say(row)


def _chosen(
    tests: list[str], pattern: str, share: float, least: int, most: int, seed: int
) -> list[str]:
    tests = [x for x in tests if re.search(pattern, x)]
    count = min(max(least, math.ceil(share * len(tests))), most, len(tests))
    return sorted(random.Random(seed).sample(tests, count))


# --- the process that starts them ----------------------------------------------------------------


def _start(
    path: Path, choice: dict[str, Any], limit: float, lines: Path, quick: bool
) -> subprocess.Popen[bytes]:
    lines.unlink(missing_ok=True)
    lines.touch()
    lines.with_suffix(".choice").write_text(json.dumps(choice))
    command = [sys.executable, __file__, str(path), "--worker", str(lines), "--limit", str(limit)]
    command += ["--quick"] if quick else []
    with lines.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def _read(lines: Path) -> list[dict[str, Any]]:
    whole = lines.read_text().rpartition("\n")[0]
    return [json.loads(x) for x in whole.splitlines()]


def run(
    path: Path, choice: dict[str, Any], limit: float, lines: Path, quick: bool
) -> list[dict[str, Any]]:
    """Run tests of one file, and go on in another process where one has ended or hangs."""
    rows: dict[str, dict[str, Any]] = {}
    names: list[str] | None = None
    while names is None or len(rows) < len(names):
        process = _start(path, choice, limit, lines, quick)
        seen, since = 0, time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            now = len(_read(lines))
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > 10 * limit + GRACE:
                process.kill()
                process.wait()
        said = _read(lines)
        if not said:
            print(f"{path.name} cannot be run: see {lines.with_suffix('.log')}", flush=True)
            break
        names = said[0]["chosen"] if names is None else names
        rows |= {row["name"]: row for row in said if "name" in row}
        begun = said[-1].get("begin")
        if begun:
            hung = process.returncode == -signal.SIGKILL
            text = "more than its limit" if hung else f"the process ended: {process.returncode}"
            rows[begun] = {"name": begun, "cpu": "passed", "jax": "slow" if hung else "failed"}
            rows[begun] |= {"text": text, "seconds": 0.0, "cpu_seconds": 0.0}
        choice = {"names": [x for x in names if x not in rows]}
    return list(rows.values())


# --- the table -----------------------------------------------------------------------------------


def limit_of(row: dict[str, Any]) -> str | None:
    """Return the name of the limit that a test shows."""
    for limit in LIMITS:
        if re.search(limit.test, row["name"]) and re.search(limit.text, row["text"], re.S):
            return limit.name
    return None


def table(found: dict[str, Any]) -> str:
    """Return the tables of a run, as Markdown."""
    lines = ["| file | run | passed | limits | failed | jax, s | CPU, s |"]
    lines.append("| --- |" + " ---: |" * 6)
    total: Counter[str] = Counter()
    limits: Counter[str] = Counter()
    shown: dict[str, str] = {}
    for name, rows in found["files"].items():
        count: Counter[str] = Counter()
        for row in rows:
            if row["cpu"] != "passed" or row["jax"] == "skipped":
                continue
            count["run"] += 1
            count["jax"] += row["seconds"]
            count["cpu"] += row["cpu_seconds"]
            limit = limit_of(row) if row["jax"] != "passed" else None
            count["passed" if row["jax"] == "passed" else "limits" if limit else "failed"] += 1
            if limit:
                limits[limit] += 1
                shown.setdefault(limit, f"{name}: {row['name']}")
        total += count
        lines.append(_line(f"`{name}`", count))
    lines += [_line("all", total), "", "| limit | tests | for example |", "| --- | ---: | --- |"]
    for limit in {x.name: x for x in reversed(LIMITS)}.values():
        if limits[limit.name]:
            lines.append(
                f"| {limit.name}: {limit.why} | {limits[limit.name]} | `{shown[limit.name]}` |"
            )
    return "\n".join(lines)


def _line(name: str, count: Counter[str]) -> str:
    numbers = [round(count[k]) for k in ("run", "passed", "limits", "failed", "jax", "cpu")]
    return f"| {name} | " + " | ".join(map(str, numbers)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the folder test of PyTorch's sources")
    parser.add_argument("--only", nargs="*", default=FILES, help="files of the folder")
    parser.add_argument("--tests", default="", help="a pattern of names of tests")
    parser.add_argument("--share", type=float, default=0.1, help="the share of tests that is run")
    parser.add_argument("--least", type=int, default=15, help="the least tests of a file")
    parser.add_argument("--most", type=int, default=25, help="the most tests of a file")
    parser.add_argument("--seed", type=int, default=0, help="the seed that chooses them")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for each test")
    parser.add_argument("--quick", action="store_true", help="compile without optimizations")
    parser.add_argument("--output", type=Path, default=Path("build/pytorch_tests.json"))
    parser.add_argument("--again", action="store_true", help="run again what did not pass there")
    parser.add_argument("--table", action="store_true", help="print the table of the output")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        choice = json.loads(given.worker.with_suffix(".choice").read_text())
        worker(given.folder.resolve(), choice, given.limit, given.worker, given.quick)
        return
    output = given.output.resolve()
    before = json.loads(output.read_text()) if output.exists() else {"files": {}}
    if given.table:
        print(table(before))
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = output.with_suffix(".lines")
    for name in given.only:
        path = given.folder / name
        old = {row["name"]: row for row in before["files"].get(name, [])}
        if given.again:
            wrong = [k for k, r in old.items() if r.get("jax") in ("failed", "slow")]
            choice: dict[str, Any] = {"names": wrong}
        else:
            choice = {"pattern": given.tests, "share": given.share, "seed": given.seed}
            choice |= {"least": given.least, "most": given.most}
        start = time.perf_counter()
        rows = run(path, choice, given.limit, lines, given.quick)
        keeps = given.again or given.tests
        old = {**(old if keeps else {}), **{r["name"]: r for r in rows}}
        before["files"][name] = list(old.values())
        output.write_text(json.dumps(before, indent=1))
        count = Counter(r.get("jax", "not on the CPU") for r in rows)
        print(f"{name}: {dict(count)} in {time.perf_counter() - start:.0f} s", flush=True)
    print(table(before))


if __name__ == "__main__":
    main()
