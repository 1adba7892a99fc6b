"""The README's table of speed: some rows of docs/performance.md, which other programs measured.

python benchmarks/pages/summary.py --output README.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages.page import table, write_section

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
BRIDGES = ("torch2jax", "wrap_torch2jax", "buffer_callback", "pure_callback")
CALLS = {
    "a call in a compiled loop, 2 inputs": "2 inputs, 1 output",
    "an eager call, `a + b`": "eager, a + b",
    "`jit(grad)` of a small function": "jit(grad), sum(tanh(a @ b))",
    "`jit(vmap)` of 64 rows": "jit(vmap) of 64 rows, tanh(a @ b)",
    "`jit(vmap(grad))` of 64 rows": "jit(vmap(grad)) of 64 rows, sum(tanh(a @ b))",
}
"""The README's words, and the row of the page."""
TRAINING = "value and gradient of a transformer, x native PyTorch"

Rows = dict[str, dict[str, str]]
"""By the first cell of a row: its cells, by the head of their column."""


def rows_of(page: str) -> Rows:
    """All tables of a page in one; where a first cell occurs twice, its first row."""
    found: Rows = {}
    head: list[str] = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif not cells[0].startswith("---"):
            found.setdefault(cells[0], dict(zip(head, cells, strict=True)))
    return found


def summary(page: str) -> str:
    rows = rows_of(page)
    lines = [[title, *(rows[row].get(b, "-") for b in BRIDGES)] for title, row in CALLS.items()]
    ratios = {"torch2jax": "torch2jax, tape", "wrap_torch2jax": "wrap_torch2jax"}
    steps = [rows.get(ratios.get(b, ""), {}).get("x PyTorch", "-") for b in BRIDGES]
    return table(["µs", *BRIDGES], [*lines, [TRAINING, *steps]])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="replace the table of FILE")
    arguments = parser.parse_args()
    text = summary(PAGE.read_text(encoding="utf-8"))
    print(text)
    if arguments.output:
        write_section(arguments.output, text, "summary")


if __name__ == "__main__":
    main()
