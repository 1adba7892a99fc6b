"""Functions that misread or refuse the int32 in which JAX carries int64 get a second attempt.

While x64 is off JAX carries PyTorch's int64 as int32. See NOTE [Integers of 64 bits]: operands that
reach an operator that is not proven for int32 become int64. A function that fails otherwise with
int32 operands is run once more with int64 in their place, and a note says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence, Set
from typing import TypeVar

import torch

from ..._errors import Torch2JaxError, Torch2JaxWarning
from ..torch_side.inference import FakeSurvived, ShapeDependsOnValues, ValuesNeeded
from ..torch_side.integers import IntegerUse
from .arguments import Casts

Found = TypeVar("Found")


class Notes:
    """The user reads these notes about a wrapped function, and each of them once."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._given: set[str] = set()

    def private_copies(self, names: Sequence[str]) -> None:
        """Say that the function gets copies of these arguments, because it changes them."""
        self._give(
            f"{self._label} changes {', '.join(names)} in place; JAX arrays are immutable, so it "
            "gets a private copy at each call. Name the argument in inplace_argnums to receive its "
            "updated value without a copy, or clone it yourself."
        )

    def int64(self, names: Sequence[str]) -> None:
        """Say that these arguments reach the function as int64."""
        self._give(
            f"{self._label} refuses int32, so {', '.join(names)} reach it as int64 (JAX's x64 mode "
            "is off). arg_dtypes= or int64 examples say so without this note."
        )

    def _give(self, text: str) -> None:
        if text not in self._given:
            self._given.add(text)
            warnings.warn(text, Torch2JaxWarning, stacklevel=4)


def widened(casts: Casts, operands: Iterable[int]) -> Casts:
    """Return ``casts`` with these operands as int64."""
    return tuple(sorted([*casts, *((i, torch.int64) for i in operands)], key=lambda cast: cast[0]))


def attempted(
    attempt: Callable[[Casts, IntegerUse], Found],
    casts: Casts,
    narrow: Set[int],
    labels: Sequence[str],
    notes: Notes,
) -> tuple[Casts, Found]:
    """Return casts, and what ``attempt`` returns with them.

    ``narrow`` are the operands that may be int64 instead of int32. Those that ``attempt`` found to
    need it become int64. Where it fails and has found none, all of them do, with a note. Where
    int64 fails, too, the attempt without it counts.
    """

    def wide(operands: Set[int]) -> tuple[Casts, Found] | None:
        """Attempt it with these as int64, and with others that then turn out to need it."""
        while operands:
            wanted, integers = widened(casts, operands), IntegerUse()
            try:
                found = attempt(wanted, integers)
            except Exception:
                return None
            if integers.needing_int64() & narrow <= operands:
                return wanted, found
            operands = operands | (integers.needing_int64() & narrow)
        return None

    integers = IntegerUse()
    try:
        found = attempt(casts, integers)
    except (FakeSurvived, ShapeDependsOnValues, ValuesNeeded, Torch2JaxError):
        raise
    except Exception:
        second = wide(integers.needing_int64() & narrow)
        if second is None and (second := wide(narrow)) is not None:
            notes.int64([labels[i] for i in sorted(narrow)])
        if second is None:
            raise
        return second
    return wide(integers.needing_int64() & narrow) or (casts, found)
