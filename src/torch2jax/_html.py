"""What notebooks show of our reports: tables, and bars that say how the parts compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["bar", "bytes_of", "page", "table"]

COLOURS = ("#2563eb", "#93c5fd", "#d97706", "#6b7280")
"""The colours of the parts, those of the plots in the documentation."""

_WIDTH, _HEIGHT = 480, 18


def page(title: str, *parts: str) -> str:
    """Return a report as one block of HTML."""
    return f"<div><strong>{escape(title)}</strong>{''.join(parts)}</div>"


def bar(parts: Mapping[str, float], whole: float | None = None) -> str:
    """Return one bar of parts with a legend; an SVG, which needs neither scripts nor styles.

    Args:
      parts: how large each part is, by what the legend says.
      whole: what the full width stands for, by default the sum of the parts.
    """
    whole = max(sum(parts.values()), whole or 0) or 1
    drawn, legend, at = [], [], 0.0
    for colour, (name, size) in zip(COLOURS, parts.items(), strict=False):
        width = size / whole * _WIDTH
        drawn.append(
            f'<rect x="{at:.1f}" y="0" width="{width:.1f}" height="{_HEIGHT}" fill="{colour}">'
            f"<title>{escape(name)}</title></rect>"
        )
        legend.append(f'<font color="{colour}">&#9632;</font> {escape(name)}')
        at += width
    outline = (
        f'<rect x="0" y="0" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#6b7280"/>'
    )
    return (
        f'<div><svg width="{_WIDTH}" height="{_HEIGHT}" role="img">{"".join(drawn)}{outline}</svg>'
        f"<br>{' &nbsp; '.join(legend)}</div>"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; numbers stand on the right."""
    lines = [_row("th", heads), *(_row("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _row(tag: str, cells: Sequence[Any]) -> str:
    def cell(x: Any) -> str:
        side, text = ("right", f"{x:,}") if isinstance(x, int) else ("left", escape(str(x)))
        return f'<{tag} align="{side}">{text}</{tag}>'

    return f"<tr>{''.join(map(cell, cells))}</tr>"


def bytes_of(count: int) -> str:
    """Return a number of bytes as people read it.

    >>> bytes_of(1536), bytes_of(20)
    ('1.5 KiB', '20 B')
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
