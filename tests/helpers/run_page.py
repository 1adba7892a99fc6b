"""Run the code of Markdown pages: `python tests/helpers/run_page.py [--write] [--alone] PAGE ...`.

The blocks marked ```python make one program, in order (with `--alone` each is a program by itself).
A block marked ```text right after one is what it prints, and must be; `--write` puts it there.
Blocks with other marks are shown to the reader and not run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import traceback
from pathlib import Path
from typing import Any

BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```$(?:\n+^```text\n(?P<printed>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


class Failure(Exception):
    """A block raised, or printed something else."""


def run(text: str, name: str, alone: bool = False) -> str:
    """Run a page; returns it with what its blocks print now."""
    names: dict[str, Any] = {"__name__": "__main__"}
    parts, end = [], 0
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start("code"))
        if alone:
            names = {"__name__": "__main__"}
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                # Empty lines before it: a traceback tells the lines of the page.
                exec(compile("\n" * line + block["code"], name, "exec"), names)
        except Exception as error:
            told = traceback.format_exc()
            raise Failure(f"{name}, the block after line {line} raised:\n{told}") from error
        if block["printed"] is not None:
            parts += [text[end : block.start("printed")], printed.getvalue()]
            end = block.end("printed")
    return "".join([*parts, text[end:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE")
    parser.add_argument("--write", action="store_true", help="put what was printed into the page")
    parser.add_argument("--alone", action="store_true", help="each block is a program by itself")
    arguments = parser.parse_args()
    for page in arguments.pages:
        text = page.read_text(encoding="utf-8")
        try:
            now = run(text, str(page), arguments.alone)
        except Failure as failure:
            print(failure)
            return 1
        if arguments.write:
            page.write_text(now, encoding="utf-8")
        elif now != text:
            pairs = zip(text.splitlines(), now.splitlines(), strict=False)
            old, new = next((pair for pair in pairs if pair[0] != pair[1]), ("", "other lines"))
            print(f"{page} says {old!r}, and its code prints {new!r}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
