"""A kept graph has saved tensors, and others may hold its operands.

This file imports torch, never JAX.

NOTE [What a kept graph may hold]. XLA reuses and moves its buffers, and always does inside a scan.
So a kept graph must hold no view of an operand. Hooks on saved tensors replace each such view by
its place in the operand (``_View``) and rebuild it from the operands of the backward call. Views
are found by storage, so views of another dtype and lazily conjugated ones are found too. The hooks
switch off torch's check that a saved tensor was not changed in place, so ``SavedTensors`` makes it.
A view that is held outside of saved tensors (``ctx.x = x``, the closures of
``torch.utils.checkpoint``) shows in reference counts after the forward pass. Then, and where hooks
are refused (``torch.func`` inside ``f``), the function works on copies of its operands that torch
owns. The choice is made per function, once (``GraphPolicy``), and ``tape_info()`` shows it. Small
operands are copied too, once hooks have told how large the graph is: their copies are cheaper than
hooks.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from ..gradients import Indices, Tensor, Tensors
from ..modules import loans
from .habits import Habit


class GraphPolicy:
    """A policy says how one function's graphs are kept, by what is known of it and calls taught.

    Calls on several threads share it, so they only ever set what they learn.
    """

    def __init__(self, label: str, wrt: Indices, seeded: bool) -> None:
        self.label = label
        """The function in ``tape_info()``."""
        self.wrt = wrt
        """Operands that its graphs are differentiated in."""
        self.seeded = seeded
        """Whether it draws from a key, which a checkpointed block does again going backward."""
        self.copies = False
        """Whether the function works on copies of its operands."""
        self.unhooked = False
        """Whether it refuses hooks on saved tensors."""
        self.by_backward = False
        """Whether its graph refuses ``autograd.grad``, so that ``backward()`` must do."""
        self.small: dict[tuple[torch.Size, ...], int] = {}
        """Shapes of operands whose copies cost less than hooks, and the bytes of their graph."""
        self.habits: dict[torch.device, Habit] = {}
        """How late its graphs are taken, by device."""


class KeptGraph:
    """A kept graph has edges of its outputs, and its leaves, but no view of an operand."""

    def __init__(self, policy: GraphPolicy, device: torch.device, saved: SavedTensors) -> None:
        self.policy, self.device, self.saved = policy, device, saved
        self.outputs: list[GradientEdge | None] = []
        self.inputs: list[Tensor] = []
        """Leaves of the graph: empty shells, or torch's own copies of the operands (``owned``)."""
        self.owned = False
        self.storages = saved.storages
        self.loans: Sequence[loans.Loan] = ()
        """Replicas of modules that the graph runs again in its backward pass."""
        self.reused = False
        """Whether its token was used more than once, so that it stays after a backward pass."""
        self.lock = threading.Lock()


class SavedTensors:
    """A ``SavedTensors`` packs what a forward pass saves, and holds what it is rebuilt from.

    See NOTE [What a kept graph may hold]. A packed tensor is a function without arguments that
    gives it back. This object is no part of ``KeptGraph``, because the graph refers to it.
    """

    def __init__(self, operands: Tensors) -> None:
        self.operands = operands
        """Those of the forward pass, then of the backward call under way; none between the two."""
        self.versions: list[int] = []
        """The operands' versions at the end of the forward pass."""
        self.storages: dict[int, int] = {}
        """Address and bytes of the storages that the graph holds."""
        self.by_address = {x.data_ptr(): i for i, x in enumerate(operands)}
        self.by_address.pop(0, None)  # tensors without elements are there

    def unchanged(self, operand: int, expected: int) -> Tensor:
        """Return an operand, if its version is still the one that was saved."""
        x = self.operands[operand]
        # The forward pass may still be under way.
        version = self.versions[operand] if self.versions else x._version
        if version != expected:
            raise _modified(x, expected, version)
        return x

    def pack(self, t: Tensor) -> Callable[[], Tensor]:
        if t.layout is not torch.strided:
            return partial(_torchs_own, _without_node(t), t._version)
        storage = t.untyped_storage()
        address = storage.data_ptr()
        index = self.by_address.get(address)
        if index is None:
            self.storages[address] = storage.nbytes()
            return partial(_torchs_own, _without_node(t), t._version)
        x = self.operands[index]
        version = x._version  # it is its own, or that of another tensor in the same memory
        conj, neg = t.is_conj(), t.is_neg()
        if t.shape == x.shape and t.dtype is x.dtype and t.is_contiguous() and not (conj or neg):
            return partial(self.unchanged, index, version)
        size, stride, offset = t.size(), t.stride(), t.storage_offset()
        return _View(self, index, t.dtype, size, stride, offset, conj, neg, version)


def _without_node(t: Tensor) -> Tensor:
    """Detach a tensor: an output that its own node saves would be a cycle that nobody collects."""
    return t.detach() if t.requires_grad else t


def _torchs_own(t: Tensor, expected: int) -> Tensor:
    """Return a saved tensor in torch's memory, if its version is still the one that was saved."""
    if t._version != expected:
        raise _modified(t, expected, t._version)
    return t


class _View(NamedTuple):
    """A ``_View`` says where a saved view of an operand lies in the operand."""

    saved: SavedTensors
    operand: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any
    conj: bool
    neg: bool
    version: int

    def __call__(self) -> Tensor:
        x = self.saved.unchanged(self.operand, self.version)
        if x.dtype is self.dtype:
            t = x.as_strided(self.size, self.stride, self.offset)
        else:
            t = torch.empty(0, dtype=self.dtype, device=x.device)
            t = t.set_(x.untyped_storage(), self.offset, self.size, self.stride)
        t = t.conj() if self.conj else t
        return torch._neg_view(t) if self.neg else t


def refuses_hooks(error: RuntimeError) -> bool:
    """Return whether a function cannot run under hooks on saved tensors.

    ``torch.func.grad`` inside it says so; ``torch.func.jvp``, and a checkpoint under vmap, save
    tensors without storage.
    """
    words = ("saved tensor hooks", "BatchedTensorImpl", "invalid python storage")
    return any(x in str(error) for x in words)


def packing(saved: SavedTensors) -> saved_tensors_hooks:
    """Return a context in which ``saved`` packs what autograd saves."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # loading it takes seconds
    if dynamo is not None:
        _exempt_from_compilation(dynamo)
    return saved_tensors_hooks(saved.pack, operator.call)


@functools.cache
def _exempt_from_compilation(dynamo: Any) -> None:
    """Keep torch.compile from compiling the hooks where a compiled function calls them."""
    for f in (
        SavedTensors.pack,
        SavedTensors.unchanged,
        _without_node,
        _torchs_own,
        _View.__call__,
    ):
        dynamo.skip_code(f.__code__)


def _modified(t: Tensor, expected: int, version: int) -> RuntimeError:
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: [{t.type()} {list(t.shape)}] is at version {version}; expected version "
        f"{expected} instead."
    )


@functools.cache
def empty(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


def storages_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return address and bytes of the storages; wrappers of ``torch.func`` have none."""
    found = {}
    for x in tensors:
        with contextlib.suppress(RuntimeError):
            if size := (storage := x.untyped_storage()).nbytes():
                found[storage.data_ptr()] = size
    return found


def saved_tensors(out: Tensors) -> Iterator[Tensor]:
    """Yield the tensors that the nodes of the graph of ``out`` save."""
    pending = [y.grad_fn for y in out if y.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        for name in dir(node):
            if name == "saved_tensors" or name.startswith("_saved_"):
                with contextlib.suppress(RuntimeError):  # fn's own backward pass may free it
                    value = getattr(node, name)
                    values = value if isinstance(value, tuple | list) else (value,)
                    yield from (x for x in values if isinstance(x, Tensor))
        following = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= following
        pending += following


def _references(x: Tensor) -> tuple[int, int, int, int]:
    """Count the references in C++ and Python, to the storage and then to the tensor."""
    storage = x.untyped_storage()
    uses = _storage_references(storage._cdata)
    return uses, sys.getrefcount(storage), x._use_count(), sys.getrefcount(x)  # type: ignore[attr-defined]


_storage_references = torch._C._storage_Use_Count


def _least_references() -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Return the counts where nobody else refers to an operand: for a leaf, and for another."""
    operands = (torch.zeros(1),)
    leaves = [operands[0].detach().requires_grad_()]
    inputs = [leaves[0]]
    edge = get_gradient_edge(leaves[0])
    for i, x in enumerate(leaves):
        watched = _references(x) if i == 0 else None
    del inputs, edge
    leaves = [operands[0].detach()]
    for i, x in enumerate(leaves):
        plain = _references(x) if i == 0 else None
    return watched, plain  # type: ignore[return-value]


_WATCHED, _PLAIN = _least_references()


def referenced_elsewhere(operands: Tensors, leaves: list[Tensor], wrt: Indices) -> bool:
    """Return whether something beside our own lists refers to an operand's storage or to a leaf."""
    shared: set[int] | None = None
    for i, x in enumerate(leaves):
        storage, storage_object, tensor, tensor_object = _references(x)
        least = _WATCHED if i in wrt else _PLAIN
        if storage_object > least[1] or tensor > least[2] or tensor_object > least[3]:
            return True
        if storage > least[0]:
            if shared is None:  # two operands may be one buffer
                owners = Counter(y.untyped_storage()._cdata for y in operands)
                shared = {owner for owner, count in owners.items() if count > 1}
            if operands[i].untyped_storage()._cdata not in shared:
                return True
    return False
