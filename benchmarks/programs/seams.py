"""What it costs to go between the frameworks under torchax's names, beside torchax itself.

    python benchmarks/programs/seams.py --torchax PYTHON --output docs/performance.md

Microseconds of the calling thread's own time for one call, each package in a process of its own.
What XLA computes meanwhile, in other threads, does not count. The arrays are small.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages.page import measured, number, table, write_section
from subjects.peers import versions

SUBJECT = Path(__file__).resolve().parents[1] / "subjects" / "torchax_seams.py"


def told(python: str, which: str, calls: int, rounds: int) -> dict[str, Any]:
    environment = dict(os.environ)
    if which == "torchax":
        environment.pop("PYTHONPATH", None)
    command = [python, "-W", "ignore", str(SUBJECT), which, str(calls), str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--calls", type=int, default=200, help="calls of each mean (200)")
    add("--rounds", type=int, default=15, help="means, of which the least counts (15)")
    add("--torchax", metavar="PYTHON", help="interpreter that has torchax")
    add("--output", type=Path, metavar="FILE", help="replace the section of FILE")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    ours = told(sys.executable, "torch2jax", arguments.calls, arguments.rounds)["us"]
    parts = [measured(load, versions())]
    if arguments.torchax:
        other = told(arguments.torchax, "torchax", arguments.calls, arguments.rounds)
        named = ", ".join(f"{name} {version}" for name, version in other["versions"].items())
        theirs = other["us"]
        rows = [
            [name, number(us), number(theirs[name]), f"{us / theirs[name]:.2f} x"]
            for name, us in ours.items()
        ]
        parts += [
            f"torchax in a process of its own: {named}.",
            table(["µs", "torch2jax.torchax", "torchax", "ratio"], rows),
        ]
    else:
        parts.append(table(["µs", "torch2jax.torchax"], [[k, number(v)] for k, v in ours.items()]))
    text = "\n\n".join(parts)
    print(text)
    if arguments.output:
        write_section(arguments.output, text, "seams")


if __name__ == "__main__":
    main()
