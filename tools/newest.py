"""Compare the newest PyTorch and JAX with the README's table of tested versions.

    python tools/newest.py                # what pip finds for this Python, by the network
    python tools/newest.py --installed    # what this environment has

It exits with 1 where a release is newer than every row. `make test-matrix` makes the row of it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
PACKAGES = ("torch", "jax")


def release_of(version: str) -> tuple[int, ...]:
    """The first three numbers: 2.13.0+cpu is the PyTorch 2.13.0."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    if not numbers:
        raise ValueError(f"{version!r} is no version.")
    parts = [int(x) for x in numbers[0].split(".")][:3]
    return (*parts, *[0] * (3 - len(parts)))


def tested(readme: str) -> dict[str, str]:
    """The newest version of each package that has a row in the table."""
    _, _, rest = readme.partition("<!-- versions: begin -->")
    table, end, _ = rest.partition("<!-- versions: end -->")
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    if not end or len(lines) < 3:
        raise SystemExit("README.md has no table of versions.")
    head, _, *rows = lines
    columns = {name: [row[head.index(name)] for row in rows] for name in PACKAGES}
    return {name: max(found, key=release_of) for name, found in columns.items()}


def installed(name: str) -> str:
    return importlib.metadata.version(name)


def offered(name: str) -> str:
    """The newest release that pip finds for this Python."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index"]
    done = subprocess.run([*command, "versions", name], stdout=subprocess.PIPE, text=True)
    found = re.match(rf"{name} \(([^)]+)\)", done.stdout)
    if done.returncode != 0 or not found:
        raise SystemExit(f"pip does not say which versions of {name} there are.")
    return found[1]


def untested(readme: str, version_of: Callable[[str], str]) -> list[str]:
    """One sentence for each package whose version is newer than every row."""
    told = []
    for name, newest in tested(readme).items():
        version = version_of(name)
        if release_of(version) > release_of(newest):
            told.append(
                f"{name} {version} is newer than {newest}, the newest in the README's table of "
                "tested versions. `make test-matrix` tests it and writes its row."
            )
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--installed", action="store_true", help="without the network")
    arguments = parser.parse_args()
    readme = README.read_text(encoding="utf-8")
    told = untested(readme, installed if arguments.installed else offered)
    print("\n".join(told) or f"The table has the newest: {tested(readme)}")
    return int(bool(told))


if __name__ == "__main__":
    sys.exit(main())
