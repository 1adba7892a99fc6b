"""What a call of a JAX function from PyTorch costs, beside JAX alone, PyTorch alone and the peers.

    python benchmarks/programs/reverse.py
    python benchmarks/programs/reverse.py --peers PYTHON ... --output docs/performance.md

Subjects run in interleaved rounds, each in the process of its interpreter; figures are medians of
the rounds' microseconds a call, with the least of them in parentheses. Every call ends when its
result is computed. (It is not named jax2torch.py: that would shadow the peer of that name.)

- JAX: the jitted function, and its jitted forward and backward passes, on arrays
- PyTorch: the same function written in PyTorch
- empty: an autograd.Function that computes nothing, the floor of a Python function under autograd
- raw parts: an autograd.Function of the DLPack imports and exports below the public ones and two
  jitted functions written for ``f``, without a check: what is left where no Python is
- ours: jax2torch
- recompute: an autograd.Function around jitted ``f`` and ``jax.vjp`` that converts by the public
  DLPack functions and runs forward again in backward, as one writes it by hand
- jax2torch package, torchax: the peers, in the first of the interpreters named by ``--peers`` in
  which they run; torchax on tensors of its own type
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages.page import measured, write_section
from subjects.reverse_subjects import CASES, PEERS, SUBJECTS

HERE = Path(__file__).resolve().parent
BUDGETS = {"no_grad": 15.0, "graph": 25.0, "forward and backward": 20.0}

Samples = dict[str, list[float]]


class Process:
    """``reverse_subjects.py`` under some interpreter."""

    def __init__(self, python: str) -> None:
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        if python != sys.executable:
            env.pop("PYTHONPATH", None)  # may name our sources
        command = [python, str(HERE.parent / "subjects" / "reverse_subjects.py")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended at {do} {request}; its error is above")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(
    processes: list[Process], case: str, n: int, rounds: int, calls: int
) -> tuple[Samples, list[str]]:
    """Microseconds of each subject, by round, and why there are none where there are none."""
    where: dict[str, Process] = {}
    notes: list[str] = []
    for subject in SUBJECTS:
        reasons = []
        for process in processes[1:] if subject in PEERS else processes[:1]:
            reply = process.ask("prepare", subject=subject, case=case, n=n)
            if "skip" not in reply:
                where[subject] = process
                break
            reasons.append(re.sub(r" at 0x\w+", "", reply["skip"].partition("\n")[0]))
        else:
            if subject not in PEERS:
                raise SystemExit(f"{subject} does not run: {'; '.join(reasons)}")
            notes.append(f"No figure of {subject}: {'; '.join(reasons) or 'no --peers'}.")
    samples: Samples = {subject: [] for subject in where}
    for _ in range(rounds):
        for subject, process in where.items():
            reply = process.ask("sample", subject=subject, case=case, n=n, calls=calls)
            samples[subject].append(reply["us"])
    return samples, notes


def overhead(case: str, samples: Samples) -> list[float]:
    """Ours above JAX alone, for both passes above an empty Function and JAX, round by round."""
    rows = zip(samples["ours"], samples["JAX"], samples["empty"], strict=True)
    both = case == "forward and backward"
    return [ours - alone - (empty if both else 0) for ours, alone, empty in rows]


def report(processes: list[Process], n: int, rounds: int, calls: int) -> list[str]:
    lines = ["", f"### tanh(x * w) of float32[{n}, {n}]", ""]
    columns: dict[str, Samples] = {}
    notes: dict[str, None] = {}
    for case in CASES:
        columns[case], found = measure(processes, case, n, rounds, calls)
        notes |= dict.fromkeys(found)
    lines += ["| µs a call | " + " | ".join(CASES) + " |", "| --- |" + " ---: |" * len(CASES)]
    for subject in SUBJECTS:
        series = [columns[case].get(subject) for case in CASES]
        if any(series):
            cells = [f"{statistics.median(s):.1f} ({min(s):.1f})" if s else "-" for s in series]
            lines.append(f"| {subject} | " + " | ".join(cells) + " |")
    above = [overhead(case, columns[case]) for case in CASES]
    cells = [f"{statistics.median(s):.1f}" for s in above]
    lines.append("| **ours above the floor** | " + " | ".join(cells) + " |")
    lines.append("| budget | " + " | ".join(f"{BUDGETS[case]:.0f}" for case in CASES) + " |")
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--peers", nargs="+", metavar="PYTHON", default=[], help="interpreters with the peers")
    add("--rounds", type=int, default=60, help="interleaved rounds (60)")
    add("--calls", type=int, default=50, help="calls of a subject in a round (50)")
    add("--sizes", type=int, nargs="+", default=[4, 512], help="sizes of the square arguments")
    add("--output", type=Path, metavar="FILE", help="replace the section of FILE")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    # Of several cores the calls of one process would disturb those of another.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    processes = [Process(python) for python in (sys.executable, *arguments.peers)]
    text = [measured(load, processes[0].ask("versions")), ""]
    for process in processes[1:]:
        found = ", ".join(f"{k} {v}" for k, v in process.ask("versions").items())
        text.append(f"- peers: {found}")
    for n in arguments.sizes:
        text += report(processes, n, arguments.rounds, arguments.calls)
    for process in processes:
        process.close()
    print("\n".join(text))
    if arguments.output:
        write_section(arguments.output, "\n".join(text), "reverse")


if __name__ == "__main__":
    main()
