"""Functions that refuse the int32 in which JAX carries int64 get a second attempt.

While x64 is off JAX carries PyTorch's int64 as int32, and some operators refuse int32. A function
that fails with int32 operands is run once more with int64 in their place, and a note says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..._conversions.dtypes import x64_enabled
from ..._errors import Torch2JaxError, Torch2JaxWarning
from ..torch_side.inference import FakeSurvived, ShapeDependsOnValues, ValuesNeeded
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


def attempted(
    attempt: Callable[[Casts], Found],
    casts: Casts,
    dtypes: Sequence[torch.dtype],
    labels: Sequence[str],
    notes: Notes,
    refuses_int32: Callable[[Found], bool] = lambda found: False,
) -> tuple[Casts, Found]:
    """Return ``casts`` and what ``attempt(casts)`` returns, or those of an attempt with int64.

    ``dtypes`` are those of the operands as they come. The second attempt is made where the first
    one fails, or returned something of which ``refuses_int32`` is true. Where the second one fails
    too, the first one counts.
    """

    def with_int64() -> tuple[Casts, Found] | None:
        if x64_enabled():
            return None
        cast = {i for i, _ in casts}
        narrow = [i for i, d in enumerate(dtypes) if d is torch.int32 and i not in cast]
        if not narrow:
            return None
        widened = tuple(sorted((*casts, *((i, torch.int64) for i in narrow))))
        try:
            found = attempt(widened)
        except Exception:
            return None
        notes.int64([labels[i] for i in narrow])
        return widened, found

    try:
        found = attempt(casts)
    except (FakeSurvived, ShapeDependsOnValues, ValuesNeeded, Torch2JaxError):
        raise
    except Exception:
        second = with_int64()
        if second is None:
            raise
        return second
    return (with_int64() if refuses_int32(found) else None) or (casts, found)
