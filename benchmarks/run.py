"""Run all benchmarks, one after the other, and write their sections and plots: `make bench`.

    python benchmarks/run.py --peers .venv-peers/bin/python
    python benchmarks/run.py --quick                   # does each one run? Nothing is written
    python benchmarks/run.py --only size training      # some of them

Each is a program of its own, with more options: see README.md. GPUs: `make gpu-check`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Program(NamedTuple):
    """A file of this folder, and the page whose section of that name it writes."""

    name: str
    page: str
    options: str = ""
    quick: str = ""
    """Options of a trial, instead."""
    peers: bool = False


PAGE = "docs/performance.md"
PROGRAMS = (
    Program("features", "README.md", peers=True),
    Program("overhead", PAGE, "--build", "--rounds 3 --startup-rounds 1", peers=True),
    Program("training", PAGE, "--plot docs/images/training.png", "--rounds 3", peers=True),
    Program("size", PAGE, "--plot docs/images/size.svg", "--rounds 3 --bytes 4000000"),
    Program("reverse", PAGE, quick="--rounds 3 --sizes 4"),
    Program("device", PAGE, quick="--rounds 1"),
    Program("lowering", PAGE, quick="--rounds 2 --processes 1"),
    Program("scaling", "docs/devices.md", quick="--rounds 3"),
    Program("summary", "README.md"),  # last: it reads what the others wrote
)


def command(program: Program, quick: bool, peers: str | None) -> list[str]:
    options = program.quick if quick else f"--output {program.page} {program.options}"
    words = [sys.executable, f"benchmarks/{program.name}.py", *options.split()]
    return [*words, "--peers", peers] if program.peers and peers else words


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [program.name for program in PROGRAMS]
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of the peers' environment")
    parser.add_argument("--quick", action="store_true", help="a short trial, written nowhere")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    arguments = parser.parse_args()
    peers = os.path.abspath(arguments.peers) if arguments.peers else None
    failed, times = [], []
    for program in PROGRAMS:
        if program.name in arguments.only:
            print(f"\n==== {program.name}", flush=True)
            started = time.monotonic()
            done = subprocess.run(command(program, arguments.quick, peers), cwd=ROOT)
            times.append(f"{time.monotonic() - started:6.0f} s  {program.name}")
            failed += [program.name] * (done.returncode != 0)
    print("\n==== times", *times, sep="\n")
    if failed:
        print(f"==== failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
