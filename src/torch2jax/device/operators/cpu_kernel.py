"""PyTorch's kernels for the CPU refuse what those for meta tensors let pass, or with other texts.

They run on small tensors of ones and zeros in place of the operands, once for each program and its
shapes. What they raise for values is of no interest.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jax.core import Tracer
from torch.utils._python_dispatch import _disable_current_modes

from ..._compat.jax import x64_enabled

__all__ = ["quiet", "refusal_of"]

_SMALL = 4096
"""Operands of so many elements together are made as they are, larger ones with shorter sides."""
_SHORT = 8
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_INEXACT = {torch.float32, torch.float64, torch.complex64, torch.complex128}
_WIDE = {torch.float64, torch.complex128}
_ORDINARY = {torch.bool, *_INTEGERS, *_INEXACT}
"""For other dtypes PyTorch has fewer kernels on the CPU than on accelerators."""
_VALUES = re.compile(
    r"(?<!Dimension )out of (\w+ )?(bounds|range)|index \S+ is out|ZeroDivision|singular|converge|"
    r"positive.definite|number of ones|allocate|lengths|enough memory|invalid index|deterministic|"
    r"non-negative|cannot be interpreted"
)
_BY_PLACE = re.compile(r"^(index|put|take|scatter|gather)")
"""Integers among the operands of these operators are indices, for which zeros will do."""

_ACCELERATORS_TAKE_MORE = re.compile(r"(_foreach_)?(abs|histc|nansum|softsign|trace)_?$")
"""By PyTorch's table of operator samples these take integers, booleans or complex numbers on an
accelerator and not on a CPU. Mixtures of experts count by ``histc`` of integers."""

_BY_NUMBERS = re.compile(r"(slice|select|diagonal|strided)_scatter|^roll")
"""Numbers among the operands of these operators are places."""

_warning = threading.RLock()


_IGNORE = ("ignore", None, Warning, None, 0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Say nothing in this scope.

    The filters are one list for all threads. ``warnings.catch_warnings`` would also forget which
    warnings have been shown, and show them again.
    """
    with _warning:
        filters: Any = warnings.filters
        filters.insert(0, _IGNORE)
        try:
            yield
        finally:
            filters.remove(_IGNORE)


def refusal_of(
    func: Any,
    values: Sequence[Any],
    dtypes: Sequence[torch.dtype | None],
    arguments: Callable[[Sequence[Any]], tuple[list[Any], dict[str, Any]]],
    *,
    wanted: bool = False,
) -> Exception | None:
    """Return the error with which PyTorch's kernel for the CPU refuses operands, or None.

    Args:
      func: the operator.
      values: its operands: arrays, and numbers, which may be tracers.
      dtypes: PyTorch's dtypes of the operands, None for numbers.
      arguments: makes the operator's arguments of operands.
      wanted: the operands are refused, and the question is how.
    """
    kinds = {d for d in dtypes if d is not None}
    if (
        func.namespace != "aten"
        or _BY_NUMBERS.search(func._opname)
        or _ACCELERATORS_TAKE_MORE.match(func._opname)
        or not kinds
        or not (wanted or kinds <= _ORDINARY)
        or (kinds & _WIDE and not x64_enabled())  # they are carried in half the width
    ):
        return None
    sizes = [v.shape for v, d in zip(values, dtypes, strict=True) if d is not None]
    if not all(type(n) is int for shape in sizes for n in shape):
        return None
    exact = sum(map(math.prod, sizes)) <= _SMALL
    if wanted and not exact:
        return None
    by_place = _BY_PLACE.match(func._opname)
    indices = bool(by_place) or bool(kinds & _INTEGERS and kinds & _INEXACT)
    # Indices are zero, and masks select nothing.
    zeros = (_INTEGERS if indices else set()) | ({torch.bool} if len(kinds) > 1 else set())
    made = [
        _one(v) if d is None else _tensor(v.shape, d, exact, zeros)
        for v, d in zip(values, dtypes, strict=True)
    ]
    args, kwargs = arguments(made)
    if math.prod(max(abs(n), 1) for n in _integers([*args, *kwargs.values()])) > _SMALL:
        return None  # the result may be large
    if any(x.name == "device" for x in func._schema.arguments):
        kwargs["device"] = "cpu"
    try:
        with quiet(), _disable_current_modes(), torch.no_grad():
            func(*args, **kwargs)
    except NotImplementedError as error:
        text = str(error)
        refused = re.search("implemented for|supported", text) and "Could not run" not in text
        return error if refused else None
    except torch.linalg.LinAlgError:
        return None
    except Exception as error:
        if not exact or (indices and not wanted and not by_place):
            return None
        text = str(error)
        return error if "size 0" in text or not _VALUES.search(text) else None
    return None


def _one(x: Any) -> Any:
    """Return the number one, of the same type as another."""
    return x.dtype.type(1).item() if isinstance(x, Tracer) else type(x)(1)


def _tensor(shape: Any, dtype: torch.dtype, exact: bool, zeros: set[torch.dtype]) -> torch.Tensor:
    shape = shape if exact else [min(n, _SHORT) for n in shape]
    return torch.full(shape, 0 if dtype in zeros else 1, dtype=dtype, device="cpu")


def _integers(x: Any) -> Iterator[int]:
    if type(x) is int:
        yield x
    elif isinstance(x, list | tuple):
        for item in x:
            yield from _integers(item)
