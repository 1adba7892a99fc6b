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
    """A file of a folder beside this one, and the page whose section of that name it writes."""

    name: str
    page: str
    options: str = ""
    quick: str = ""
    """Options of a trial, instead."""
    peers: str = ""
    """How it takes the other bridges' interpreters, by the names of this program's options."""
    folder: str = "programs"


PAGE = "docs/performance.md"
PEERS = ("peers", "reverse", "torchax")
"""Environments of other bridges, by the file of their requirements."""
PROGRAMS = (
    Program("features", "README.md", peers="--peers {peers}"),
    Program("overhead", PAGE, "--build", "--rounds 3 --startup-rounds 1", "--peers {peers}"),
    Program("training", PAGE, "--plot docs/images/training.png", "--rounds 3", "--peers {peers}"),
    Program("size", PAGE, "--plot docs/images/size.svg", "--rounds 3 --bytes 4000000"),
    Program("results", PAGE, "", "--rounds 3 --sizes 4000000"),
    Program("reverse", PAGE, "", "--rounds 3 --sizes 4", "--peers {reverse} {torchax}"),
    Program("device", PAGE, "", "--rounds 1", "--torchax {torchax}"),
    Program("seams", PAGE, "", "--calls 20 --rounds 2", "--torchax {torchax}"),
    Program("compiled", PAGE, "", "--rounds 3"),
    Program("lowering", PAGE, "", "--rounds 2 --processes 1", "--torchax {torchax}"),
    Program("first_calls", PAGE, "", "--rounds 1 --models BERT", "--torchax {torchax}"),
    Program("scaling", "docs/devices.md", quick="--rounds 3"),
    Program("recipes", "docs/recipes/libraries.md", quick="--rounds 3 --seconds 1"),
    Program("summary", "README.md", folder="pages"),  # last: it reads what the others wrote
)


def command(program: Program, quick: bool, pythons: dict[str, str]) -> list[str]:
    options = program.quick if quick else f"--output {program.page} {program.options}"
    words = [sys.executable, f"benchmarks/{program.folder}/{program.name}.py", *options.split()]
    option, *names = program.peers.split() or [""]
    given = [python for name in names if (python := pythons[name.strip("{}")])]
    return [*words, option, *given] if given else words


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [program.name for program in PROGRAMS]
    for name in PEERS:
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"see requirements/{name}.txt")
    parser.add_argument("--quick", action="store_true", help="a short trial, written nowhere")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in PEERS}
    pythons = {name: os.path.abspath(python) if python else "" for name, python in given.items()}
    failed, times = [], []
    for program in PROGRAMS:
        if program.name in arguments.only:
            print(f"\n==== {program.name}", flush=True)
            started = time.monotonic()
            done = subprocess.run(command(program, arguments.quick, pythons), cwd=ROOT)
            times.append(f"{time.monotonic() - started:6.0f} s  {program.name}")
            failed += [program.name] * (done.returncode != 0)
    print("\n==== times", *times, sep="\n")
    if failed:
        print(f"==== failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
