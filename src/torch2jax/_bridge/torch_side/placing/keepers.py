"""Who keeps a tensor whose memory is only lent gets memory of its own.

This file imports torch, never JAX.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from ...._compat.torch import owners_of_storage, owners_of_tensor
from .. import ambient
from ..preserving import thawed

Tensor = torch.Tensor


def give_memory(storage: Any) -> bool:
    """Return whether nothing but the caller has a storage; else move the tensors that have it.

    They are moved where each reference to each of them is known, such as those of containers,
    attributes, closures and variables. A NumPy array, an autograd graph or an operator that runs
    on another thread has a reference that nobody sees, and may have the address of the memory. Then
    all stays as it is, and the handler refuses the call.
    """
    if owners_of_storage(storage) == 1:
        return True
    gc.collect(1)
    if owners_of_storage(storage) > 1:
        with ambient.clean_surroundings(torch.get_default_dtype()), thawed(), _undisturbed():
            _move(storage)
    return False


def _move(storage: Any) -> None:
    copy = torch.empty(0, dtype=torch.uint8).set_(storage).clone().untyped_storage()
    tensors = _tensors_of(storage)
    if owners_of_storage(storage) != 1 + len(tensors):
        return
    if all(_is_known(tensors, i) for i in range(len(tensors))):
        for t in tensors:
            t.data = _same(t, copy)


def _same(t: Tensor, storage: Any) -> Tensor:
    empty = torch.empty(0, dtype=t.dtype)
    return empty.set_(storage, t.storage_offset(), t.size(), t.stride())  # type: ignore[call-overload]


def _tensors_of(storage: Any) -> list[Tensor]:
    found = []
    for x in gc.get_objects():
        if issubclass(type(x), Tensor) and x.layout is torch.strided and x.device.type == "cpu":
            try:
                if x.untyped_storage()._cdata == storage._cdata:
                    found.append(x)
            except (RuntimeError, NotImplementedError):  # fake and functional tensors have none
                continue
    return found


def _is_known(tensors: list[Tensor], i: int) -> bool:
    """Return whether each reference to a tensor is one of a container, an object or a variable."""
    views = sum(t._base is tensors[i] for t in tensors)
    if owners_of_tensor(tensors[i]) != 1 + views:
        return False
    known = _unseen_of_base() if views else _unseen_of_leaf()
    return _unseen(tensors, i) == known + _in_variables(tensors[i])


def _unseen(tensors: list[Tensor], i: int) -> int:
    """Return how many references to a tensor the garbage collector does not see."""
    holders = gc.get_referrers(tensors[i])
    seen = sum(sum(x is tensors[i] for x in gc.get_referents(h)) for h in holders)
    return sys.getrefcount(tensors[i]) - seen


def _in_variables(tensor: Tensor) -> int:
    """Return how many variables of functions that run on other threads have a tensor.

    An operator that runs there has a reference beside.
    """
    found = 0
    for thread, frame in sys._current_frames().items():
        each: FrameType | None = None if thread == threading.get_ident() else frame
        while each is not None:
            found += sum(x is tensor for x in each.f_locals.values())
            each = each.f_back
    return found


def _unseen_of_leaf() -> int:
    return _unseen([torch.empty(1)], 0)


def _unseen_of_base() -> int:
    """Return the same of a tensor that a view has, which differs between versions of torch."""
    tensors = [torch.empty(1)]
    with torch.no_grad():
        tensors.append(tensors[0][:])
    return _unseen(tensors, 0)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Have no other thread run Python between two steps that keep Python's lock."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
