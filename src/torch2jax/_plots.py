"""What the reports draw with matplotlib, which is loaded for a plot alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._html import COLOURS

__all__ = ["bars"]


def bars(rows: Mapping[str, Mapping[str, float]], title: str, unit: str, axes: Any = None) -> Any:
    """Draw one horizontal bar for each row, made of its parts; return the axes.

    Args:
      rows: how large each part is, by its name in the legend, by the row's label.
      title: stands above.
      unit: says what the lengths are.
      axes: matplotlib's, to draw into; by default those of a new figure.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "a plot needs matplotlib: pip install matplotlib, or torch2jax-ffi[plot]."
        ) from error
    if axes is None:
        size = (7.0, 1.2 + 0.3 * max(len(rows), 1))
        axes = pyplot.subplots(figsize=size, layout="constrained")[1]
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    left = [0.0] * len(rows)
    for i, name in enumerate(names):
        sizes = [parts.get(name, 0) for parts in rows.values()]
        axes.barh(list(rows), sizes, left=left, color=COLOURS[i % len(COLOURS)], label=name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.invert_yaxis()  # the first row stands on top
    axes.set_title(title)
    axes.set_xlabel(unit)
    if len(names) > 1:
        axes.legend()
    return axes
