"""Print what pyproject.toml asks for, one requirement a line, for `pip install -r`.

python tools/requirements.py test demo    # what these extras add
python tools/requirements.py --build      # what a build without isolation needs
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("extras", nargs="*", metavar="EXTRA")
    parser.add_argument(
        "--build", action="store_true", help="the build's requirements, less jaxlib"
    )
    arguments = parser.parse_args()

    settings = tomllib.loads(PROJECT.read_text(encoding="utf-8"))
    extras = settings["project"]["optional-dependencies"]
    lines = [line for extra in arguments.extras for line in extras[extra]]
    if arguments.build:
        # The jaxlib that a build in isolation pins would replace the one that the package runs on.
        lines += [r for r in settings["build-system"]["requires"] if not re.match(r"jaxlib\b", r)]
        lines += ["cmake", "ninja"]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
