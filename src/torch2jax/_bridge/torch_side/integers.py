"""What operators do with int32 operands says which must reach a function as int64.

NOTE [Integers of 64 bits]. PyTorch's indices, labels and counters are int64; with x64 off JAX has
int32 for them. Some of PyTorch's kernels take int32 and misread it: ``gather`` misreads an expanded
index, and so do the gradients of ``scatter_add`` and ``scatter_reduce``. So while a function's
result is inferred, we follow each int32 operand and what is computed from it. An operand that
reaches an operator outside of ``_PROVEN`` is widened to int64 for the function. Operators are
proven by ``tests/bridge/test_integers.py``: forward, backward, forward mode and batched, in all
layouts. A function that is not inferred (``output_shapes=``) gets int64 for every int32 operand:
nobody has seen what it does with them, and a wrong number is worse than a cast. ``arg_dtypes=`` and
examples that are int32 tensors decide first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

NATIVE_NAMESPACES = ("aten", "prims", "prim", "c10d", "profiler")

_PROVEN_NAMES = """
    alias as_strided detach diagonal expand lift_fresh permute select slice split
    split_with_sizes squeeze t transpose unbind unfold unsqueeze view _unsafe_view
    _reshape_alias

    _to_copy clone copy_ empty_like full_like new_empty new_empty_strided new_full new_ones
    new_zeros ones_like zeros_like
    cat stack flip roll repeat tril triu constant_pad_nd

    abs abs_ add add_ bitwise_and bitwise_and_ bitwise_left_shift bitwise_not bitwise_or
    bitwise_or_ bitwise_right_shift bitwise_xor bitwise_xor_ clamp clamp_ clamp_max clamp_min
    div div_ eq eq_ fill fill_ floor_divide floor_divide_ fmod ge ge_ gt gt_ isinf isnan
    le le_ logical_and logical_not logical_or logical_xor lt lt_ masked_fill masked_fill_ maximum
    minimum mul mul_ ne ne_ neg neg_ remainder remainder_ rsub sgn sign sub sub_ where zero_
    cos exp log log1p log2 reciprocal rsqrt sigmoid sin sqrt tanh

    all amax amin any argmax argmin cumsum max min sum

    embedding index _local_scalar_dense
"""
_PROVEN = frozenset(_PROVEN_NAMES.split())
"""Operators that read int32 right and have nothing wrong derived from them. Elementwise arithmetic
wraps at 32 bits, as that of JAX does."""

_BITS = ("aten::view", "dtype")
"""This operator reads an operand's bits, so the operand is meant to have 32 of them."""


class IntegerUse:
    """An ``IntegerUse`` records what became of int32 operands in the runs that infer a result."""

    def __init__(self) -> None:
        self.unproven: set[int] = set()
        """Operands that reached an operator that is not proven for int32."""
        self.as_bits: set[int] = set()
        """Operands whose bits were read as another dtype."""
        self._sources: dict[int, tuple[StorageWeakRef, frozenset[int]]] = {}
        self._probed: dict[Any, bool] = {}

    def needing_int64(self) -> set[int]:
        """Return the operands that must be int64."""
        return self.unproven - self.as_bits

    def start(self, operands: Sequence[torch.Tensor]) -> None:
        """Begin a run on these operands."""
        self._sources = {}
        for i, x in enumerate(operands):
            if x.dtype is torch.int32:
                self._note(x, frozenset((i,)))

    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[int]:
        """Look at an operator's arguments; return the operands that they come from."""
        if not self._sources:
            return _NONE
        sources, leaves = _NONE, tree_leaves((args, kwargs))
        for t in leaves:
            if isinstance(t, torch.Tensor) and t.dtype is torch.int32:
                sources |= self._sources_of(t)
        if not sources:
            return _NONE
        namespace, _, name = func._schema.name.partition("::")
        if func._schema.name == _BITS[0] and func._overloadname == _BITS[1]:
            self.as_bits |= sources
        elif namespace in ("prim", "profiler"):  # they query a device or a layout
            pass
        elif namespace not in NATIVE_NAMESPACES:
            if self._wants_int64(func, args, kwargs):
                self.unproven |= sources
        elif name not in _PROVEN or any(map(_may_be_cut, leaves)):
            self.unproven |= sources
        return sources

    def after(self, out: Any, sources: frozenset[int]) -> None:
        """Note that an operator's results come from these operands."""
        if sources:
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor) and t.dtype is torch.int32:
                    self._note(t, sources | self._sources_of(t))

    def _note(self, t: torch.Tensor, sources: frozenset[int]) -> None:
        if t.layout is torch.strided:  # others are made by operators that are not proven
            storage = t.untyped_storage()
            # The reference keeps another storage from taking the address.
            self._sources[storage._cdata] = (StorageWeakRef(storage), sources)

    def _sources_of(self, t: torch.Tensor) -> frozenset[int]:
        if t.layout is not torch.strided:
            return _NONE
        found = self._sources.get(t.untyped_storage()._cdata)
        return _NONE if found is None else found[1]

    def _wants_int64(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a library's own operator gets int64.

        It does unless it runs on int32 and refuses int64. The operator runs on zeros to tell,
        because its shape formula need not look at dtypes as the kernel does.
        """
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        key = (func, *(t.dtype for t in tensors))
        if key not in self._probed:
            self._probed[key] = _refusal(
                func, args, kwargs, torch.int32
            ) is not None or not re.search(
                r"\b(Int|int32|IntTensor)\b", _refusal(func, args, kwargs, torch.int64) or ""
            )
        return self._probed[key]


_NONE: frozenset[int] = frozenset()
_LOW, _HIGH = -(2**31), 2**31 - 1


def _may_be_cut(x: Any) -> bool:
    """Whether int32 may not hold an argument that takes the dtype of the tensors beside it.

    Those are numbers, and tensors of int64 without dimensions, of which nobody knows the values.
    """
    if isinstance(x, torch.Tensor):
        return x.ndim == 0 and x.dtype is torch.int64
    return type(x) in (int, float) and math.isfinite(x) and not _LOW <= x <= _HIGH


def _refusal(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> str | None:
    """Return what an operator raises for zeros with ``dtype`` for int32; None where it runs."""

    def zeros(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        made = torch.zeros(
            (), dtype=dtype if t.dtype is torch.int32 else t.dtype, device=t.device
        ).expand(t.shape)  # it takes no memory of its own
        return made.clone() if func._schema.is_mutable else made

    with _disable_current_modes():
        try:
            func(*tree_map(zeros, args), **tree_map(zeros, kwargs))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None
