"""While x64 is off, 64-bit floats are carried in 32 bits, and a warning names the user's line.

NOTE [Floats of 64 bits]. A tensor of float64 holds an array of float32 while x64 is off, and one of
complex128 an array of complex64. Its torch dtype says float64 all the same, as that of int64 does:
types are promoted by PyTorch's rules, ``x.dtype`` is what the program asked for, gradients and
results of ``.cpu()`` have it too. The warning stands where such a tensor comes to be (a factory, a
cast, a move), and not where it is used.
"""

from __future__ import annotations

import math
import sys
import warnings
from types import FrameType, TracebackType

import torch

from .._errors import Torch2JaxError, Torch2JaxWarning, UnsupportedDtypeError
from .dtypes import x64_enabled
from .narrowed import NARROWED

__all__ = [
    "WIDE_FLOATS", "admit", "is_carried", "narrow_floats", "narrow_number",
    "strict_float64",
]  # fmt: skip

WIDE_FLOATS = frozenset(d for d in NARROWED if d.is_floating_point or d.is_complex)
"""These are float64 and complex128."""

_strict = False


class strict_float64:
    """Refuse 64-bit floats while x64 is off; by default they are carried in 32 bits.

    It counts on device "jax", under ``lower=True`` and for the names of torchax, on all threads. A
    function that is compiled already runs as it is. As a statement it lasts; ``with`` ends it.

    Args:
        enabled: whether a new tensor of float64 or complex128 is an ``UnsupportedDtypeError``
            instead of a warning.

    >>> import torch, torch2jax
    >>> torch2jax.device.enable()
    >>> with torch2jax.device.strict_float64():
    ...     try:
    ...         torch.ones(2, dtype=torch.float64, device="jax")
    ...     except TypeError as error:
    ...         print(str(error).partition(",")[0])
    torch.float64 needs 64-bit values
    """

    def __init__(self, enabled: bool = True) -> None:
        global _strict
        self._before, _strict = _strict, bool(enabled)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _strict
        _strict = self._before


def is_carried(dtype: torch.dtype | None) -> bool:
    """Say whether arrays of a floating dtype have half of its bits, because x64 is off."""
    return dtype in WIDE_FLOATS and not x64_enabled()


def admit(dtype: torch.dtype | None, asked: bool = True) -> None:
    """Warn that a new tensor of ``dtype`` has 32 bits, once for each line of the user's code.

    ``asked`` says that the code names the dtype, in a factory, a cast or a move.

    Raises:
        UnsupportedDtypeError: in strict mode.
        Torch2JaxError: the same where the dtype comes of operands. A TypeError in a + b would make
            Python try b's way.
    """
    if dtype is None or not is_carried(dtype):
        return
    narrow, on = NARROWED[dtype], 'jax.config.update("jax_enable_x64", True)'
    if _strict:
        kind = UnsupportedDtypeError if asked else Torch2JaxError
        raise kind(
            f"{dtype} needs 64-bit values, which JAX has switched off. Switch them on, {on}, or "
            f"use {narrow}. (device.strict_float64() forbids carrying it as {narrow}.)"
        )
    frame = _users_frame()
    warnings.warn_explicit(
        f"Explicitly requested dtype {dtype} is not available while 64-bit values are switched off "
        f"in JAX: the values are carried as {narrow}. {on} switches them on, and "
        f"torch2jax.device.strict_float64() makes this an error.",
        Torch2JaxWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__", "<unknown>"),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )


def narrow_floats(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor of 64-bit floats in 32 bits while x64 is off, and others as they are."""
    if not is_carried(x.dtype):
        return x
    narrow = x.to(NARROWED[x.dtype])
    beyond = narrow.isinf() & x.isfinite()
    if x.is_complex() or not beyond.any():
        return narrow
    return torch.where(beyond, narrow.sign() * _MOST, narrow)


def narrow_number(x: float) -> float:
    """Return the number for float32 that has the meaning of one for float64.

    A finite one stays finite, one that is not 0 stays that, and one below 1 stays below. So
    ``torch.finfo(torch.float64)`` gives bounds that are good for float32: its ``max`` becomes that
    of float32, its ``tiny`` as well, and ``1 - eps`` the number before 1.
    """
    size = abs(x)
    if _BEFORE_ONE < size < 1:
        size = _BEFORE_ONE
    elif _MOST < size < math.inf:
        size = _MOST
    elif 0 < size < _LEAST:
        size = _LEAST
    else:
        return x
    return math.copysign(size, x)


_MOST, _LEAST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
_BEFORE_ONE = 1 - torch.finfo(torch.float32).eps / 2


_NOT_THE_USERS = {__name__.split(".")[0], "torch", "jax", "jaxlib", "contextlib", "functools"}


def _users_frame() -> FrameType:
    """Return the innermost frame that is not ours, PyTorch's or JAX's, or the outermost one."""
    frame = sys._getframe(1)
    while True:
        root = frame.f_globals.get("__name__", "").split(".")[0]
        generated = frame.f_code.co_filename.startswith("<eval_with_key>")
        if frame.f_back is None or not (root in _NOT_THE_USERS or generated):
            return frame
        frame = frame.f_back
