"""A trace may ask for values of memory from before it. Its program holds while they stay the same.

``captured`` gives the values to ``w.item()`` and to a mask as index.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..._errors import Torch2JaxWarning
from ..tensors.tensor import Cell, Tensor

__all__ = ["KnownValues", "warn_of_changes"]


class _Known(NamedTuple):
    cell: Cell
    number: int | None
    """The number of the surroundings' tensor whose memory it is, or None."""
    array: Any
    values: Any


class KnownValues:
    """An instance has the values that a trace asked for.

    Args:
      found: the memory, with the array that it had.
      numbers: of the tensors in the surroundings, by the address of their memory.
    """

    def __init__(
        self, found: Iterable[tuple[Cell, Any]] = (), numbers: dict[int, int] | None = None
    ) -> None:
        self._known = [
            # A copy: the program may be given the array's memory.
            _Known(c, (numbers or {}).get(id(c)), array, np.array(array))
            for c, array in found
        ]

    def __bool__(self) -> bool:
        return bool(self._known)

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Say whether the values are the same, with these tensors in the surroundings."""
        for i, known in enumerate(self._known):
            cell = known.cell if known.number is None else tensors[known.number]._cell
            if cell.array is not known.array:
                if not np.array_equal(cell.array, known.values, equal_nan=True):
                    return False
                self._known[i] = known._replace(array=cell.array)
        return True


def warn_of_changes(name: str) -> None:
    warnings.warn(
        f"{name}, which is compiled for device jax, asks for values of a tensor (item(), a mask as "
        "index) that it closes over. They have changed for the third time, and each change "
        "compiles it again: keep them as tensors.",
        Torch2JaxWarning,
        stacklevel=4,
    )
