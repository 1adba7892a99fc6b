"""A kept graph: its saved tensors, and who else holds its operands. Imports torch, never JAX.

NOTE [What a kept graph may hold]. XLA reuses and moves its buffers, inside a scan always, so a kept
graph must hold no view of an operand. Hooks on saved tensors replace each such view by its place in
the operand (``_View``) and rebuild it from the operands of the backward call. Views are found by
storage, so views of another dtype and lazily conjugated ones are found too. The hooks switch off
torch's check that a saved tensor was not changed in place: ``_Saved`` makes it. And what holds a
view outside of saved tensors (``ctx.x = x``, the closures of ``torch.utils.checkpoint``) shows in
reference counts after the forward pass: then, and where hooks are refused (``torch.func`` inside
``f``), the function works on copies of its operands that torch owns. The choice is made per
function, once, and shown by ``tape_info()``. Small operands are copied too, once hooks have told
how large the graph is: copies of theirs are cheaper than hooks.
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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from ..gradients import Indices, Tensor, Tensors
from ..modules import loans

if TYPE_CHECKING:
    from .programs import KeepGraph


class KeptGraph:
    """A kept graph: edges of its outputs, and its leaves; no view of an operand."""

    def __init__(self, keep: KeepGraph, device: torch.device, source: SavedTensors) -> None:
        self.keep, self.device, self.source = keep, device, source
        self.outputs: list[GradientEdge | None] = []
        self.inputs: list[Tensor] = []
        """Leaves of the graph: empty shells, or torch's own copies of the operands (``owned``)."""
        self.owned = False
        self.storages = source.storages
        self.leases: Sequence[loans.Lease] = ()
        """Replicas of modules that the graph runs again in its backward pass."""
        self.reused = False
        self.lock = threading.Lock()


class SavedTensors:
    """Packs what a forward pass on ``operands`` saves, and what it is rebuilt from.

    See NOTE [What a kept graph may hold]. Packed, a tensor is a function without arguments that
    gives it back. Apart from the graph: the graph refers to it.
    """

    def __init__(self, operands: Tensors) -> None:
        self.operands = operands
        """Of the forward pass, then of the backward call under way, and none between them."""
        self.versions: list[int] = []
        """Of the operands at the end of the forward pass."""
        self.storages: dict[int, int] = {}
        """Address and bytes of the storages that the graph holds."""
        self.by_address = {x.data_ptr(): i for i, x in enumerate(operands)}
        self.by_address.pop(0, None)  # where tensors without elements are

    def unchanged(self, operand: int, saved: int) -> Tensor:
        """An operand, if its version is still the one that was saved."""
        x = self.operands[operand]
        # The forward pass may still be under way.
        version = self.versions[operand] if self.versions else x._version
        if version != saved:
            raise _modified(x, saved, version)
        return x

    def pack(self, t: Tensor) -> Callable[[], Tensor]:
        if t.layout is not torch.strided:
            return partial(_own, t, t._version)
        storage = t.untyped_storage()
        address = storage.data_ptr()
        index = self.by_address.get(address)
        if index is None:
            self.storages[address] = storage.nbytes()
            # With its node, an output that its own node saves would be a cycle that nobody
            # collects.
            return partial(_own, t.detach() if t.requires_grad else t, t._version)
        x = self.operands[index]
        version = x._version  # its own, or that of another tensor in the same memory
        conj, neg = t.is_conj(), t.is_neg()
        if t.shape == x.shape and t.dtype is x.dtype and t.is_contiguous() and not (conj or neg):
            return partial(self.unchanged, index, version)
        size, stride, offset = t.size(), t.stride(), t.storage_offset()
        return _View(self, index, t.dtype, size, stride, offset, conj, neg, version)


def _own(t: Tensor, saved: int) -> Tensor:
    """A saved tensor of torch's own, if its version is still the one that was saved."""
    if t._version != saved:
        raise _modified(t, saved, t._version)
    return t


class _View(NamedTuple):
    """A saved view of an operand: where it lies in it."""

    source: SavedTensors
    operand: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any
    conj: bool
    neg: bool
    version: int

    def __call__(self) -> Tensor:
        x = self.source.unchanged(self.operand, self.version)
        if x.dtype is self.dtype:
            t = x.as_strided(self.size, self.stride, self.offset)
        else:
            t = torch.empty(0, dtype=self.dtype, device=x.device)
            t = t.set_(x.untyped_storage(), self.offset, self.size, self.stride)
        t = t.conj() if self.conj else t
        return torch._neg_view(t) if self.neg else t


def refuses_hooks(error: RuntimeError) -> bool:
    """Whether a function cannot run under hooks on saved tensors.

    ``torch.func.grad`` inside it says so; a checkpoint under vmap saves tensors without storage.
    """
    return "saved tensor hooks" in str(error) or "BatchedTensorImpl" in str(error)


def packing(source: SavedTensors) -> saved_tensors_hooks:
    """A context in which ``source`` packs what autograd saves."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # loading it takes seconds
    if dynamo is not None:
        _exempt_from_compilation(dynamo)
    return saved_tensors_hooks(source.pack, operator.call)


@functools.cache
def _exempt_from_compilation(dynamo: Any) -> None:
    """Have torch.compile not compile the hooks where a compiled function calls them."""
    for f in (SavedTensors.pack, SavedTensors.unchanged, _own, _View.__call__):
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
    """Address and bytes of the storages; wrappers of ``torch.func`` have none."""
    found = {}
    for x in tensors:
        with contextlib.suppress(RuntimeError):
            if size := (storage := x.untyped_storage()).nbytes():
                found[storage.data_ptr()] = size
    return found


def saved_tensors(out: Tensors) -> Iterator[Tensor]:
    """What the graph of ``out`` saves, asked of its nodes."""
    pending = [y.grad_fn for y in out if y.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        for name in dir(node):
            if name == "saved_tensors" or name.startswith("_saved_"):
                with contextlib.suppress(RuntimeError):  # freed by a backward pass inside fn
                    value = getattr(node, name)
                    values = value if isinstance(value, tuple | list) else (value,)
                    yield from (x for x in values if isinstance(x, Tensor))
        following = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= following
        pending += following


def _references(x: Tensor) -> tuple[int, int, int, int]:
    """To its storage, to that as a Python object, to the tensor, and to that as a Python object."""
    storage = x.untyped_storage()
    uses = _storage_references(storage._cdata)
    return uses, sys.getrefcount(storage), x._use_count(), sys.getrefcount(x)  # type: ignore[attr-defined]


_storage_references = torch._C._storage_Use_Count


def _unheld() -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Counts for a leaf, and for an operand that is none, which nobody else refers to."""
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


_WATCHED, _PLAIN = _unheld()


def referenced_elsewhere(operands: Tensors, leaves: list[Tensor], wrt: Indices) -> bool:
    """Whether something beside our own lists refers to an operand's storage or to a leaf."""
    shared: set[int] | None = None
    for i, x in enumerate(leaves):
        storage, held, uses, references = _references(x)
        least = _WATCHED if i in wrt else _PLAIN
        if held > least[1] or uses > least[2] or references > least[3]:
            return True
        if storage > least[0]:
            if shared is None:  # two operands may be one buffer
                owners = Counter(y.untyped_storage()._cdata for y in operands)
                shared = {owner for owner, count in owners.items() if count > 1}
            if operands[i].untyped_storage()._cdata not in shared:
                return True
    return False
