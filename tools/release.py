"""Print the changelog's section of a tag, after a look whether the tree has that version.

    python tools/release.py v0.1.0

It fails where pyproject.toml, the package and CITATION.cff do not all say this version, and where
the changelog still calls it unreleased.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def versions(root: Path = ROOT) -> dict[str, str]:
    """Return the version that each file says."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {"pyproject.toml": project["version"]}
    for name, pattern in (
        ("src/torch2jax/__init__.py", r'^__version__ = "(.+)"$'),
        ("CITATION.cff", r"^version: (.+)$"),
    ):
        match = re.search(pattern, (root / name).read_text(encoding="utf-8"), re.M)
        found[name] = match[1] if match else "none"
    return found


def notes(version: str, changelog: str) -> str:
    """Return the section of a version; an error where there is none or it is unreleased."""
    match = re.search(
        rf"^## {re.escape(version)}(?: \(([^)\n]+)\))?$\n(.*?)(?=^## |\Z)", changelog, re.M | re.S
    )
    if match is None:
        sys.exit(f"CHANGELOG.md has no section {version}.")
    if not match[1] or match[1] == "unreleased":
        sys.exit(f"CHANGELOG.md says no day for {version}: write `## {version} (YYYY-MM-DD)`.")
    return match[2].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tag", help="such as v0.1.0")
    version = parser.parse_args().tag.removeprefix("v")
    wrong = {name: said for name, said in versions().items() if said != version}
    if wrong:
        sys.exit(f"the tag says {version}, but " + ", ".join(f"{k} {v}" for k, v in wrong.items()))
    print(notes(version, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
