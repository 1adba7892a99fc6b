"""Two helpers split and merge lists of arguments of which some are static."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["merge", "partition"]


def partition(original: Sequence[Any], func: Callable[[Any], bool]) -> tuple[list[Any], list[Any]]:
    """Return (elements of which ``func`` is true, the others), with None in the other places."""
    chosen = [bool(func(x)) for x in original]
    return (
        [x if yes else None for x, yes in zip(original, chosen, strict=True)],
        [None if yes else x for x, yes in zip(original, chosen, strict=True)],
    )


def merge(list1: Sequence[Any], list2: Sequence[Any]) -> list[Any]:
    """Return the lists of ``partition`` as one again."""
    assert len(list1) == len(list2), (len(list1), len(list2))
    return [b if a is None else a for a, b in zip(list1, list2, strict=True)]
