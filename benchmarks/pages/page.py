"""What every benchmark writes into a Markdown page: a section between two marks, with its facts."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def write_section(page: Path, text: str, mark: str) -> None:
    """Replace what stands between ``<!-- mark: begin -->`` and ``<!-- mark: end -->``."""
    before, _, after = _parted(page, mark)
    page.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")


def section(page: Path, mark: str) -> str:
    """What stands there now."""
    return _parted(page, mark)[1]


def _parted(page: Path, mark: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, found_begin, rest = page.read_text(encoding="utf-8").partition(begin)
    text, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"{page} has no section between {begin} and {end}")
    return before + begin, text, end + after


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Words in the first column, numbers in the others."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Three digits."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3}f}"


def machine() -> str:
    return f"{_cpu()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


_PATHS = {"--peers": "PYTHON", "--wheel": "WHEEL", "--json": "FILE", "--torchax": "PYTHON"}


def shown_command() -> str:
    """The command that runs, without the paths of this machine."""
    program = Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix()
    words, current = ["python", program], ""
    for word in sys.argv[1:]:
        option, equals, _ = word.partition("=")
        if equals and option in _PATHS:
            word = f"{option}={_PATHS[option]}"
        current = word if word.startswith("--") else current
        words.append(word if word.startswith("--") else _PATHS.get(current, word))
    return " ".join(words)


def measured(load: float, versions: dict[str, str]) -> str:
    """The sentence with which a section begins."""
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"Measured {datetime.date.today()} on {machine()} (load {load:.1f} at the start), by\n"
        f"`{shown_command()}`: {named}."
    )
