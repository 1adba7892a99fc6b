"""What a call through torch2jax costs, beside other bridges and beside no bridge at all.

    python benchmarks/programs/overhead.py --peers PYTHON --output docs/performance.md

Every subject runs in the same run, in interleaved rounds (A B C, A B C, ...): what else the machine
does then meets all of them. Figures are medians of the rounds; in the table of budgets the least of
the rounds stands beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages.page import machine, shown_command, write_section
from pages.report import Budget, Figure, Report, markdown, print_tables
from subjects.cases import CASES, WIDTHS
from subjects.peers import PEERS, SUBJECTS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OURS = "torch2jax"
PEER = "wrap_torch2jax"

Samples = dict[str, dict[str, list[float]]]
"""By case and subject: microseconds a call, one figure a round."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--peers", metavar="PYTHON", help="interpreter of the peers' environment (see README.md)")
    add("--rounds", type=int, default=60, help="rounds of the tables of calls (60)")
    add("--startup-rounds", type=int, default=5, help="processes started for each bridge (5)")
    add("--only", nargs="+", metavar="CASE", choices=list(CASES), help="these cases alone")
    add("--build", action="store_true", help="also build a wheel from source")
    add("--wheel", type=Path, metavar="FILE", help="a wheel whose size to report")
    add("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    add("--output", type=Path, metavar="FILE", help="replace the measured section of FILE")
    return parser.parse_args()


class Worker:
    """A ``worker.py`` under some interpreter."""

    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen(
            [python, str(HERE.parent / "subjects" / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(python),
        )

    def ask(self, **request: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended at {request}; its error is above")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def workers(peers: str | None) -> Iterator[dict[str, Worker]]:
    """The worker of each subject."""
    ours = Worker(sys.executable)
    other = Worker(peers) if peers else None
    try:
        yield {name: (other or ours) if name in PEERS else ours for name in SUBJECTS}
    finally:
        for worker in filter(None, (ours, other)):
            worker.close()


def environment(python: str) -> dict[str, str]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if python != sys.executable:
        env.pop("PYTHONPATH", None)  # may name our sources
    return env


def time_calls(
    of: dict[str, Worker], names: Sequence[str], rounds: int, progress: Progress
) -> tuple[Samples, dict[str, dict[str, str]]]:
    """Samples, and why there are none where there are none."""
    samples: Samples = {}
    skipped: dict[str, dict[str, str]] = {}
    task = progress.add_task("compiling", total=len(names) * len(of))
    for case in names:
        samples[case], skipped[case] = {}, {}
        for subject, worker in of.items():
            reply = worker.ask(do="prepare", subject=subject, case=case)
            if "skip" in reply:
                skipped[case][subject] = reply["skip"]
            else:
                samples[case][subject] = []
            progress.advance(task)
    for _ in progress.track(range(rounds), description="timing calls"):
        for case in names:
            for subject, series in samples[case].items():
                reply = of[subject].ask(do="sample", subject=subject, case=case)
                series.append(reply["us"])
    return samples, skipped


def time_startup(peers: str | None, rounds: int, progress: Progress) -> Samples:
    """Seconds, by stage and bridge. A first round warms the disk's cache and does not count."""
    bridges = {OURS: sys.executable, **({PEER: peers} if peers else {})}
    stages: Samples = {stage: {b: [] for b in bridges} for stage in ("import", "first", "next")}
    if rounds == 0:
        return stages
    for number in progress.track(range(rounds + 1), description="starting processes"):
        for bridge, python in bridges.items():
            command = [python, str(HERE / "startup.py"), bridge]
            out = subprocess.run(command, env=environment(python), capture_output=True, text=True)
            if out.returncode != 0:
                raise SystemExit(f"startup.py {bridge} failed:\n{out.stderr}")
            if number > 0:
                for stage, seconds in json.loads(out.stdout).items():
                    stages[stage][bridge].append(seconds)
    return stages


def build_wheel(directory: str) -> tuple[float, Path]:
    """Seconds to build a wheel from source, isolated as pip does it, downloads included."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir"]
    subprocess.run([*command, "--wheel-dir", directory, str(ROOT)], check=True)
    return time.perf_counter() - start, next(Path(directory).glob("*.whl"))


# --- budgets: section 9 of the design ------------------------------------------------------------


def combine(f: Callable[..., float], *series: Sequence[float]) -> Figure:
    """``f`` of several series: the median over the rounds, and ``f`` of the least of each."""
    each = [f(*values) for values in zip(*series, strict=True)]
    return Figure(statistics.median(each), f(*map(min, series)))


def slope(*values: float) -> float:
    """Least squares, over the numbers of inputs."""
    mean = statistics.fmean(WIDTHS)
    spread = sum((n - mean) ** 2 for n in WIDTHS)
    return sum((n - mean) * v for n, v in zip(WIDTHS, values, strict=True)) / spread


def slopes(samples: Samples) -> dict[str, Figure]:
    """Microseconds for each further argument, by subject."""
    series = [samples.get(f"loop{n}", {}) for n in WIDTHS]
    common = [s for s in SUBJECTS if all(s in case for case in series)]
    return {s: combine(slope, *(case[s] for case in series)) for s in common}


def budgets(samples: Samples, startup: Samples) -> list[Budget]:
    found: list[Budget] = []

    def add(
        title: str,
        limit: float,
        unit: str,
        case: str,
        subjects: Sequence[str],
        f: Callable[..., float],
    ) -> None:
        series = [samples.get(case, {}).get(s) for s in subjects]
        if all(series):
            found.append(Budget(title, combine(f, *filter(None, series)), limit, unit))

    def ratio(title: str, case: str, parts: int) -> None:
        add(f"{title} / {PEER}", 1 / parts, "", case, (OURS, PEER), lambda a, b: a / b)

    title = "call in a loop"
    empty = (OURS, "empty FFI call")
    add(f"{title}, above an empty FFI call", 1.0, "µs", "loop2", empty, lambda a, b: a - b)
    ratio(title, "loop2", 5)
    if OURS in (each := slopes(samples)):
        found.append(Budget("each further argument", each[OURS], 0.25, "µs"))
    add(
        "(eager call - PyTorch) / jax.jit's eager call",
        1.3,
        "",
        "eager",
        (OURS, "PyTorch", "jax.numpy"),
        lambda ours, torch, jax: (ours - torch) / jax,
    )
    ratio("jit(grad)", "grad", 3)
    ratio("jit(vmap)", "vmap", 8)
    ratio("jit(vmap(grad))", "vmap_grad", 30)
    ratio("jit(jacrev)", "jacrev", 15)
    stages = {
        "import": ("import, above torch and jax", 0.15),
        "first": ("first wrap and call in a process", 1.5),
        "next": ("wrap and call of the next function", 0.1),
    }
    for stage, (title, limit) in stages.items():
        if series := startup[stage].get(OURS):
            found.append(Budget(title, combine(lambda s: s, series), limit, "s"))
    return found


# --- the run -------------------------------------------------------------------------------------


def main() -> None:
    args = arguments()
    names = args.only or list(CASES)
    load = os.getloadavg()[0]
    with Progress(transient=True) as progress:
        with workers(args.peers) as of:
            versions = {"torch2jax": of[OURS].ask(do="versions")}
            if args.peers:
                versions["peers"] = of[PEER].ask(do="versions")
            samples, skipped = time_calls(of, names, args.rounds, progress)
        startup = time_startup(args.peers, args.startup_rounds, progress)

    checks = budgets(samples, startup)
    with tempfile.TemporaryDirectory() as directory:
        wheel = args.wheel
        if args.build:
            seconds, wheel = build_wheel(directory)
            checks.append(Budget("build from source", Figure(seconds, seconds), 60, "s"))
        if wheel:
            size = wheel.stat().st_size / 1000
            checks.append(Budget("wheel", Figure(size, size), 400, "kB"))

    report = Report(
        date=datetime.date.today().isoformat(),
        machine=machine(),
        load=load,
        versions=versions,
        command=shown_command(),
        rounds=args.rounds,
        startup_rounds=args.startup_rounds,
        titles={name: CASES[name].title for name in names},
        calls={
            case: {s: combine(lambda v: v, series) for s, series in of_case.items()}
            for case, of_case in samples.items()
        },
        skipped=skipped,
        slopes=slopes(samples),
        startup={
            stage: {b: combine(lambda v: v, series) for b, series in of_stage.items() if series}
            for stage, of_stage in startup.items()
        },
        budgets=checks,
    )
    print_tables(report)
    if args.json:
        raw = {"samples_us": samples, "startup_s": startup}
        args.json.write_text(json.dumps({**report.as_dict(), **raw}, indent=1) + "\n")
    if args.output:
        write_section(args.output, markdown(report), "overhead")


if __name__ == "__main__":
    main()
