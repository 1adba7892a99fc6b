"""Who keeps a tensor whose memory is only lent gets memory of its own.

This file imports torch, never JAX.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...._compat.torch import owners_of_storage, owners_of_tensor
from .. import ambient
from ..preserving import thawed

Tensor = torch.Tensor


def give_memory(storage: Any) -> bool:
    """Return whether nothing but the caller has a storage; else move the tensors that have it.

    They are moved where each reference to each of them is known: those of containers, attributes
    and closures are. A NumPy array, an autograd graph or a running operator of another thread may
    have the address of the memory itself. Then all stays as it is, and the handler refuses the call.
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
    """Return whether all that refers to a tensor is in sight of the garbage collector."""
    views = sum(t._base is tensors[i] for t in tensors)
    if owners_of_tensor(tensors[i]) != 1 + views:
        return False
    return _unseen(tensors, i) == (_unseen_of_base() if views else _unseen_of_leaf())


def _unseen(tensors: list[Tensor], i: int) -> int:
    """Return how many references to a tensor the garbage collector does not see."""
    holders = gc.get_referrers(tensors[i])
    seen = sum(sum(x is tensors[i] for x in gc.get_referents(h)) for h in holders)
    return sys.getrefcount(tensors[i]) - seen


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
