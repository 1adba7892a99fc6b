"""A tensor is a cell that holds one JAX array, and the view steps from there to what it shows.

NOTE [The wrapper's C++ device is lazy]. To C++ a tensor is on "lazy:0", to Python on "jax:0".
PyTorch's autograd engine gives each accelerator's backward pass a thread of its own, where JAX's
tracers do not work. There it asks the device guard, which must not raise. For "lazy" the backward
pass stays on the caller's thread without a guard. Kernels are registered for both keys.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax.core import Tracer
from torch.utils._python_dispatch import _disable_current_modes

from ..._compat.jax import ArrayImpl, get_opaque_trace_state, trace_state_clean
from ..._conversions.convert import default_array, j2t
from ..._conversions.float64 import narrow_floats
from ..._conversions.small import PACKED, widened
from ..._errors import Torch2JaxError, UnsupportedDtypeError
from ...lowerings.promotion import array_dtype
from ...lowerings.registry import ValuesAsked
from ...lowerings.views import unseen
from ..thread_state import state
from .view_chains import Chain

__all__ = [
    "Cell",
    "Observer",
    "Tensor",
    "asked",
    "become",
    "from_torch",
    "known",
    "read",
    "recorded",
    "refuse_overlap",
    "replace",
    "take_memory",
    "to_torch",
    "wrap",
    "write",
]

LAZY = torch.device("lazy", 0)
# PyTorch finds autocast's kernels by a key of their own, which "lazy" does not bring.
AUTOCAST: Any = torch._C.DispatchKey.AutocastPrivateUse1  # type: ignore[attr-defined]
KEYS = torch._C.DispatchKeySet(AUTOCAST)
OPTIONS = {"device": LAZY, "_extra_dispatch_keys": KEYS}
make = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
AFTER_DTYPE = (torch.strided, LAZY, False, False, None, False, False, KEYS)
"""The same as ``OPTIONS``: all that ``make`` takes after the dtype, by position. PyTorch looks for
each name that it knows, at half a microsecond a call."""


class Observer:
    """An observer is told of memory that is made and read, on any thread."""

    def born(self, cell: Cell) -> None:
        pass

    def read(self, x: Tensor) -> None:
        pass

    def seen(self, x: Tensor) -> None:
        pass

    def known_array(self, cell: Cell, array: Any) -> Any:
        """Return the values of a cell that holds ``array``, where its tracer stands for them."""
        return array

    def has_values(self, cell: Cell) -> bool:
        """Say whether ``known_array`` has values for what the cell holds."""
        return False

    def is_older(self, cell: Cell) -> bool:
        """Say whether the memory is from before what is observed."""
        return False

    def is_as_before(self, cell: Cell) -> bool:
        """Say whether it is older and has not been written to since."""
        return False


_serials = itertools.count()
captures: list[Observer] = []
"""The traces of ``device.jit`` under way on all threads, and others; see ``captured``."""


def note_born(cell: Cell) -> None:
    for capture in captures:
        capture.born(cell)


class Cell:
    """A cell is memory: one array, in row-major order, which in-place operations replace.

    ``recipe`` tells how a large constant of a trace was made, so that it need not be embedded in
    the program, or integers whose values a trace may look at; see ``constants``.
    """

    __slots__ = ("__weakref__", "array", "recipe", "serial", "version")

    def __init__(self, array: Any, recipe: Any = None) -> None:
        self.array, self.recipe, self.version = array, recipe, 0
        self.serial = next(_serials)
        if captures:
            note_born(self)

    def renew(self, array: Any) -> None:
        """Put in the array that a write has made."""
        self.array, self.recipe = array, None
        self.version += 1


class Tensor(torch.Tensor):
    """A ``Tensor`` is PyTorch's on device "jax"; PyTorch's functions and ``tensor`` make it."""

    # Libraries (opt_einsum) choose what computes by the root of this name. Once the device is
    # enabled the class is found under this name, so that it can be pickled.
    __module__ = "torch.jax"

    _cell: Cell
    _chain: Chain | None = None
    _memo: Any = None
    _hooks: Any = None
    _sort: int | None = None
    """The number of dtype and sizes, where it is known; see ``sort_of``."""
    _cut = False
    """Whether JAX's derivative ends here, because it was computed while gradients were off."""
    _late = False
    """Whether it is a leaf of PyTorch's graph only since somebody asked; see ``needs_grad``."""
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # ``dispatch`` puts in ``__torch_dispatch__``, and ``methods`` puts in the everyday methods.

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _device()

    def jax(self) -> jax.Array:
        """Return the JAX array of this tensor's values; only a view is copied.

        In-place operations on the tensor do not change the array. While x64 is off the array of an
        int64 tensor is int32, and that of a float64 tensor is float32. A tensor under a trace
        returns its tracer.
        """
        for capture in captures:
            capture.read(self)
        return read(self)


def recorded(x: torch.Tensor) -> bool:
    """Return ``x.requires_grad`` as PyTorch's autograd knows it; see ``tracing.needs_grad``."""
    with torch._C.DisableTorchFunction():
        return x.requires_grad


def only_one(device: Any) -> None:
    """Refuse "jax:1": there is one device, whose tensors may be on several devices of JAX."""
    if device is not None and device.index:
        raise RuntimeError(
            f"there is no device {device}: device jax has the index 0 alone. "
            "device.mark_sharding puts a tensor on other devices of JAX."
        )


@functools.cache
def _device() -> torch.device:
    return torch.device("jax", 0)


def wrap(array: Any, dtype: torch.dtype, recipe: Any = None) -> Tensor:
    """Return a new tensor with memory of its own that is ``array``."""
    t = make(Tensor, array.shape, dtype=dtype, **OPTIONS)
    t._cell = Cell(array, recipe)
    return t


def wrap_view(
    base: Tensor,
    chain: Chain | None,
    dtype: torch.dtype,
    size: Sequence[int],
    stride: Sequence[int],
    offset: int,
) -> Tensor:
    """Return a new tensor on the memory of ``base``."""
    t = make(Tensor, size, stride, offset, dtype=dtype, **OPTIONS)
    t._cell, t._chain = base._cell, chain
    return t


_sorts: dict[Any, int] = {}
_numbers = itertools.count(1)


def sort_of(dtype: torch.dtype, size: Sequence[int]) -> int | None:
    """Return one number for all tensors of this dtype and these sizes; None where they are symbols.

    The extension tells calls apart by it. To read a number that a tensor keeps costs a fraction of
    what it costs to ask PyTorch for dtype and sizes. No number is given twice.
    """
    key = dtype, tuple(size)
    found = _sorts.get(key)
    if found is None:
        if any(type(n) is not int for n in key[1]):
            return None
        if len(_sorts) >= 65536:
            _sorts.clear()
        found = _sorts.setdefault(key, next(_numbers))
    return found


def note_sort(t: Tensor) -> int | None:
    t._sort = sort_of(t.dtype, t.shape)
    return t._sort


def read(t: Tensor) -> Any:
    """Return the values of a tensor: an array or a tracer."""
    return read_cell(t, t._cell.array)


def read_cell(t: Tensor, array: Any) -> Any:
    chain = t._chain
    if chain is None:
        return array
    if type(array) is ArrayImpl and trace_state_clean():
        return chain.read(array)
    if type(array) is ArrayImpl:
        with jax.ensure_compile_time_eval():
            return chain.read(array)
    # A view is computed once for each state of its memory and each trace that sees it.
    trace = get_opaque_trace_state()
    if t._memo is None or t._memo[0] is not array or t._memo[1] != trace:
        t._memo = (array, trace, chain.get(array))
    return t._memo[2]


def write(t: Tensor, value: Any) -> None:
    """Replace the values of a tensor. Other tensors on the same memory see them."""
    cell, chain = t._cell, t._chain
    cell.renew(value if chain is None else chain.set(cell.array, value))
    if chain is not None and chain.stops and isinstance(cell.array, Tracer):
        # The memory keeps the derivative of what it held. The tensor has that of what was written.
        t._memo = (cell.array, get_opaque_trace_state(), value)


def replace(t: Tensor, value: Any) -> None:
    """Write a value that may have another shape, as an ``out=`` takes it."""
    if value.shape == t.shape:
        write(t, value)
        return
    if t.numel():
        warnings.warn(
            f"An output with one or more elements was resized since it had shape {list(t.shape)}, "
            f"which does not match the required output shape {list(value.shape)}.",
            UserWarning,
            stacklevel=2,
        )
    become(t, wrap(value, t.dtype))


def become(x: Tensor, other: Tensor) -> Tensor:
    """Make ``x`` what ``other`` is, in sizes, dtype and memory."""
    torch.Tensor.data.__set__(x, other)  # type: ignore[attr-defined]
    x._cell, x._chain, x._memo, x._sort = other._cell, other._chain, None, None
    return x


def take_memory(x: Tensor, other: Tensor) -> Tensor:
    """Give ``x`` the memory of ``other``, as ``x.data = other`` and ``x.set_(other)`` do.

    Under ``lower=True`` it gets memory of its own with these values, because to JAX's derivative it
    is still what it was. A later write to the other's memory, which it would not see, is an error.
    """
    cell, version = other._cell, other._cell.version
    if (
        state.lowering
        and isinstance(x._cell.array, Tracer)
        and (x.dtype.is_floating_point or x.dtype.is_complex)
        and (x.dtype, x.shape) == (other.dtype, other.shape)
    ):

        def check() -> None:
            if cell.version != version:
                raise Torch2JaxError(
                    "with lower=True a tensor was written to after it had been given to another "
                    "one by x.data = y or x.set_(y): x would not see that. Write to y first, or "
                    "use x.data.copy_(y)."
                )

        state.checks += (check,)
        other = wrap(unseen(read(x), read(other)), x.dtype)
    return become(x, other)


def refuse_overlap(t: Tensor, fills: bool) -> None:
    """Refuse to write to a view that sees an element several times, unless the write fills it."""
    chain = t._chain
    assert chain is not None
    if chain.blurred or (not fills and chain.overlaps(t.shape, t.stride())):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a "
            "single memory location. Please clone() the tensor before performing the operation."
        )


def from_torch(x: torch.Tensor) -> Any:
    """Return the array of a tensor that is not on device "jax": a copy, 64-bit integers checked.

    While x64 is off 64-bit floats are float32; whoever lets them in calls ``admit``.
    """
    array_dtype(x.dtype)
    x = narrow_floats(x.detach())
    if x.layout is not torch.strided:
        x = x.to_dense()
    # An alias would see what torch writes later, so the memory has to be the array's own.
    x = x.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    try:
        return default_array(x)
    except UnsupportedDtypeError:
        if x.dtype is not torch.int64:
            raise
    # The greatest and the least int64 are those of int32, as in device/operators/extremes.py.
    x = x.masked_fill(x == 2**63 - 1, 2**31 - 1)
    return default_array(x.masked_fill(x == -(2**63), -(2**31)))


class ValueNeeded(ValuesAsked):
    """Code asks for the Python value of a tensor that is being traced."""


def known(t: Tensor) -> Any:
    """Return the values of a tensor where a trace may use them, or else its tracer.

    ``device.jit`` traces again once the values are others that a tensor from before the trace has.
    """
    array = t._cell.array
    for capture in captures:
        array = capture.known_array(t._cell, array)
    return read_cell(t, array)


def asked(t: Tensor) -> Any:
    """Return the values of a tensor that code asks for, or None where they are not known yet.

    What follows from integers has values where a trace may look at these.
    """
    array = known(t)
    if not isinstance(array, Tracer):
        return array
    if t._cell.recipe is None:
        return None
    with jax.ensure_compile_time_eval():
        array = t._cell.recipe.made()
        if isinstance(array, Tracer):  # of another trace
            return None
        return array if t._chain is None else t._chain.get(array)


def concrete(t: Tensor, what: str) -> jax.Array:
    """Return the values of a tensor, or raise ``ValueNeeded`` where it is being traced."""
    array = asked(t)
    if array is None:
        raise ValueNeeded(
            what,
            f"{what} asks for the values of a tensor that is being traced ({read(t).aval}): they "
            "are known when the compiled program runs. Branch with torch.where, keep numbers as "
            "tensors, or move this line out of the traced function.",
        )
    return array


def stays(t: Tensor, device: torch.device) -> bool:
    """Say whether a move to ``device`` leaves the tensor where it is.

    With ``lower=True`` a program for the CPU runs on tracers. Its "cpu", which it may have from a
    constant of its own, is the place where these are; their values are still refused.
    """
    return state.lowering > 0 and device.type == "cpu" and not isinstance(read(t), ArrayImpl)


def to_torch(t: Tensor, what: str = "cpu()") -> torch.Tensor:
    """Copy the values to PyTorch's own CPU memory, in the tensor's dtype.

    Values of 4-bit floats are float32 there, because PyTorch packs two of them in one element.
    """
    array = concrete(t, what)
    with _disable_current_modes():
        host = j2t(widened(np.asarray(array)))
        return host if t.dtype is PACKED else host.to(t.dtype)
