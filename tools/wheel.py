"""Build the sdist and the wheels into dist/, and audit them: `make wheel`.

The sdist is built from the tree, each wheel from the sdist: one by this Python, and where it is
older than 3.12, one for 3.12 and all later ones (abi3) by a Python 3.12, if there is one here.
On Linux auditwheel gives each wheel the widest manylinux tag that it deserves, and refuses one
that needs more than such a tag allows; abi3audit reads every symbol of an abi3 wheel.
tests/package/test_wheel.py then installs and calls them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from matrix import find_python

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"


def run(*command: str | Path) -> None:
    # The tools that auditwheel calls are beside this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    words = [str(word) for word in command]
    print("+", *(word.removeprefix(f"{ROOT}{os.sep}") for word in words[1:]), flush=True)
    if subprocess.run(words, cwd=ROOT, env={**os.environ, "PATH": path}).returncode != 0:
        sys.exit(f"failed: {' '.join(words)}")


def build_sdist() -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST)
    (sdist,) = DIST.glob("*.tar.gz")
    return sdist


def build_wheel(python: Path, sdist: Path, folder: Path) -> Path:
    """As pip builds it for a user: in isolation, with the headers of the oldest jaxlib."""
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, sdist)
    (wheel,) = folder.glob("*.whl")
    return wheel


def audit(wheel: Path) -> None:
    """Put the wheel into dist/ under the tag that it deserves."""
    if sys.platform == "linux":
        run(sys.executable, "-m", "auditwheel", "show", wheel)
        run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", DIST, wheel)
    else:
        shutil.copy(wheel, DIST)
    if "-abi3-" in wheel.name:
        run(sys.executable, "-m", "abi3audit", "--strict", "--summary", wheel)


def pythons() -> list[Path]:
    found = [Path(sys.executable)]
    if sys.version_info < (3, 12):
        other = find_python("3.12", os.environ.get("T2J_WHEEL_PY312", ""))
        if isinstance(other, Path):
            found.append(other)
        else:
            print(f"No abi3 wheel: {other}. T2J_WHEEL_PY312=PYTHON names one.")
    return found


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    shutil.rmtree(DIST, ignore_errors=True)
    sdist = build_sdist()
    for python in pythons():
        with tempfile.TemporaryDirectory() as folder:
            audit(build_wheel(python, sdist, Path(folder)))
    for file in sorted(DIST.iterdir()):
        print(f"{file.stat().st_size / 1000:6.0f} kB  {file.name}")


if __name__ == "__main__":
    main()
