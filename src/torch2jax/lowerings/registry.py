"""The table of lowerings, and what they share: PyTorch's dtypes and type promotion.

A lowering is a function of an operator's arguments, in the order and with the names of its PyTorch
signature, with arrays for tensors; it returns an array, or a tuple or list of arrays. Numbers come
as Python numbers or, where ``scalars`` is True or has the names of arguments, as weakly typed 0-d
arrays, so that another value needs no other program. What draws random numbers (``random=True``)
takes a key in front.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .._dtypes import canonical, dtype_j2t, x64_enabled
from .._errors import Torch2JaxError, UnsupportedDtypeError

__all__ = [
    "TABLE",
    "DataDependentShape",
    "Lowering",
    "carried",
    "lowering",
    "lowering_by_name",
    "lowering_of",
    "overload",
    "register_lowering",
]


@dataclass(frozen=True)
class Lowering:
    """``fn`` of arrays, and how it takes its arguments."""

    fn: Callable[..., Any]
    scalars: bool | tuple[str, ...] = False
    random: bool = False
    int32: bool = False
    """An integer result is torch.int32, whatever PyTorch's operator makes of its inputs."""
    eager: bool = False
    """It reads values: never traced, and an error where its operands are tracers."""


class DataDependentShape(Torch2JaxError):
    """The shape of the result of ``what`` depends on values that are being traced."""

    def __init__(self, what: Any) -> None:
        super().__init__(
            f"the shape of the result of {what} depends on the values of a tensor that is being "
            "traced, and XLA must know shapes when it compiles. Use a result of fixed size "
            "(torch.where with a mask, padding), or run this line outside of the traced function."
        )


TABLE: dict[Any, Lowering] = {}
_BY_NAME: dict[str, Lowering] = {}
UNKNOWN: list[str] = []
"""Names of lowerings that the installed PyTorch has no operator for."""


_SPACES = {"prims": "torch._prims", "torch_nn": "torch.nn.modules.linear_cross_entropy"}
"""Other namespaces of operators, and the modules that register them."""


def overload(name: str) -> Any:
    """The operator called "add.Tensor", "relu" (its default overload) or "prims.sin"."""
    space: Any = torch.ops.aten
    for other, module in _SPACES.items():
        if name.startswith(f"{other}."):
            with contextlib.suppress(ImportError):  # a PyTorch without it
                importlib.import_module(module)
            space, name = getattr(torch.ops, other), name.removeprefix(f"{other}.")
    packet, _, which = name.partition(".")
    return getattr(getattr(space, packet, None), which or "default", None)


def lowering(
    *names: str,
    scalars: bool | tuple[str, ...] = False,
    random: bool = False,
    int32: bool = False,
    eager: bool = False,
) -> Callable[[Any], Any]:
    """Register a function as the lowering of operators."""

    def register(fn: Any) -> Any:
        for name in names:
            op = overload(name)
            if op is None:
                UNKNOWN.append(name)
            else:
                TABLE[op] = Lowering(fn, scalars, random, int32, eager)
        return fn

    return register


def lowering_by_name(name: str) -> Callable[[Any], Any]:
    """Register a lowering of an operator that a library may bring later, such as "space::op"."""

    def register(fn: Any) -> Any:
        _BY_NAME[name] = Lowering(fn)
        return fn

    return register


def lowering_of(op: Any) -> Lowering | None:
    """The lowering of an operator."""
    return TABLE.get(op) or _BY_NAME.get(op.name())


def register_lowering(op: Any, fn: Callable[..., Any]) -> None:
    """A lowering of your own: for an operator of yours, or a better one for PyTorch's.

    Args:
        op: an operator overload such as ``torch.ops.aten.add.Tensor``,
            or a packet such as ``torch.ops.mine.op``, all of whose overloads are meant; without
            in-place arguments (those follow from the functional form).
        fn: takes what the operator takes, with JAX arrays for tensors and Python values for the
            rest, and returns an array, or a tuple of arrays. It is traced: shapes are known, values
            are not. Derivatives under ``lower=True`` are JAX's own, of ``fn``; ``backward()`` uses
            the derivative that PyTorch has for ``op``.

    Raises:
        TypeError: ``op`` is not an operator, or ``fn`` cannot be called.

    >>> import torch, torch2jax, jax.numpy as jnp
    >>> torch2jax.device.register_lowering(torch.ops.aten.sinc.default, jnp.sinc)
    """
    from ..device import dispatch

    if isinstance(op, torch._ops.OpOverloadPacket):
        overloads = [getattr(op, name) for name in op.overloads()]
    elif isinstance(op, torch._ops.OpOverload):
        overloads = [op]
    else:
        raise TypeError(f"register_lowering takes an operator of torch.ops, got {op!r}.")
    if not callable(fn):
        raise TypeError(f"register_lowering takes a function of arrays, got {fn!r}.")
    for one in overloads:
        TABLE[one] = Lowering(fn)
    dispatch.forget()


# --- dtypes --------------------------------------------------------------------------------------


def carried(dtype: torch.dtype) -> np.dtype[Any]:
    """The dtype of the array of a tensor of this dtype; int32 for int64 while x64 is off.

    Raises:
        UnsupportedDtypeError: float64, complex128 and uint64 while x64 is off, and what JAX lacks.
    """
    if dtype in _WIDE and not x64_enabled():
        raise UnsupportedDtypeError(
            f"a tensor of {dtype} on device jax needs 64-bit values, which JAX has switched off. "
            'Switch them on, jax.config.update("jax_enable_x64", True), or use '
            f"{_WIDE[dtype]}."
        )
    return canonical(dtype)


_WIDE = {
    torch.float64: torch.float32,
    torch.complex128: torch.complex64,
    torch.uint64: torch.int64,
}


def of_dtype(dtype: torch.dtype | None) -> np.dtype[Any]:
    """The dtype that a factory is asked for; None: PyTorch's default."""
    return carried(dtype or torch.get_default_dtype())


def spread(values: Any, n: int) -> tuple[int, ...]:
    """A size or step for each of ``n`` dimensions, of which one may stand for all."""
    values = (values,) if isinstance(values, int) else tuple(values)
    return values * n if len(values) == 1 else values


def kind(dtype: Any) -> int:
    """0 bool, 1 integer, 2 floating, 3 complex: the category in which PyTorch promotes."""
    if dtype == np.bool_:
        return 0
    if jnp.issubdtype(dtype, jnp.integer):
        return 1
    return 3 if jnp.issubdtype(dtype, jnp.complexfloating) else 2


def is_float(x: Any) -> bool:
    return kind(x.dtype) == 2


def is_inexact(x: Any) -> bool:
    return kind(x.dtype) >= 2


def default_float() -> np.dtype[Any]:
    return carried(torch.get_default_dtype())


def default_int() -> np.dtype[Any]:
    return carried(torch.int64)


_COMPLEX = {np.dtype(np.float64): np.dtype(np.complex128)}
_HALF = (np.dtype(jnp.bfloat16), np.dtype(np.float16))


def complex_of(dtype: Any) -> np.dtype[Any]:
    return _COMPLEX.get(np.dtype(dtype), np.dtype(np.complex64))


def real_of(dtype: Any) -> np.dtype[Any]:
    dtype = np.dtype(dtype)
    if dtype.kind != "c":
        return dtype
    return np.dtype(np.float32 if dtype.itemsize == 8 else np.float64)


@functools.lru_cache(None)
def _promoted(a: np.dtype[Any], b: np.dtype[Any]) -> np.dtype[Any]:
    return canonical(torch.promote_types(dtype_j2t(a), dtype_j2t(b)))


def is_number(x: Any) -> bool:
    """A Python number, or the weakly typed array that stands for one."""
    return isinstance(x, bool | int | float | complex) or getattr(x, "weak_type", False)


def _number_dtype(x: Any) -> np.dtype[Any]:
    rank = kind(x.dtype) if hasattr(x, "dtype") else (bool, int, float, complex).index(type(x))
    if rank == 0:
        return np.dtype(bool)
    if rank == 1:
        return default_int()
    return default_float() if rank == 2 else complex_of(default_float())


def result_dtype(*xs: Any) -> np.dtype[Any]:
    """The dtype that PyTorch computes in: tensors before 0-d tensors, those before numbers."""
    ranks: list[np.dtype[Any] | None] = [None, None, None]
    for x in xs:
        number = is_number(x)
        level = 2 if number else (0 if x.ndim else 1)
        dtype = _number_dtype(x) if number else np.dtype(x.dtype)
        have = ranks[level]
        ranks[level] = dtype if have is None else _promoted(have, dtype)
    lower = _combine(ranks[1], ranks[2])
    found = _combine(ranks[0], lower)
    assert found is not None
    return found


def _combine(high: np.dtype[Any] | None, low: np.dtype[Any] | None) -> np.dtype[Any] | None:
    if high is None or low is None:
        return low if high is None else high
    if kind(low) <= kind(high):
        return high
    if kind(high) == 2:  # complex beside a tensor of floats: as precise as the tensor
        return complex_of(high)
    return low if kind(high) == 0 or kind(low) >= 2 else _promoted(high, low)


def cast(x: Any, dtype: Any) -> Any:
    """``x`` as an array of ``dtype``. Complex to real drops the imaginary part, as in PyTorch."""
    if not hasattr(x, "dtype"):
        return jnp.asarray(x, dtype)
    if x.dtype == dtype:
        return jax.lax.convert_element_type(x, dtype) if getattr(x, "weak_type", False) else x
    if kind(x.dtype) == 3 and kind(dtype) in (1, 2):
        x = x.real
    return jax.lax.convert_element_type(x, dtype)


def promote(*xs: Any) -> list[Any]:
    """Arrays of one dtype, that of ``result_dtype``."""
    dtype = result_dtype(*xs)
    return [cast(x, dtype) for x in xs]


def wide(dtype: Any) -> np.dtype[Any]:
    """The dtype in which PyTorch computes: float32 for half precision."""
    return np.dtype(np.float32) if np.dtype(dtype) in _HALF else np.dtype(dtype)


def floating(dtype: Any) -> np.dtype[Any]:
    """The dtype of a result that is floating for integers."""
    return np.dtype(dtype) if kind(dtype) >= 2 else default_float()


def dims_of(x: Any, dims: Any) -> tuple[int, ...]:
    """Axes from ``dim=``: None and empty mean all."""
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return tuple(range(x.ndim))
    if isinstance(dims, int):
        dims = (dims,)
    n = max(x.ndim, 1)
    for d in dims:
        if not -n <= d < n:
            raise IndexError(
                f"Dimension out of range (expected to be in range of [{-n}, {n - 1}], but got {d})"
            )
    return tuple(d % x.ndim for d in dims) if x.ndim else ()
