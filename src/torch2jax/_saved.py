"""A kept graph: its saved tensors, and who else holds its operands. Imports torch, never JAX.

NOTE [What a kept graph may hold]. XLA reuses and moves its buffers, inside a scan always, so a kept
graph must hold no view of an operand. Hooks on saved tensors replace each such view by its place in
the operand (``_View``) and rebuild it from the operands of the backward call. Views are found by
storage, so views of another dtype and lazily conjugated ones are found too. The hooks switch off
torch's check that a saved tensor was not changed in place: ``_Saved`` makes it. And what holds a
view outside of saved tensors (``ctx.x = x``, the closures of ``torch.utils.checkpoint``) shows in
reference counts after the forward pass: then, and where hooks are refused (``torch.func`` inside
``f``), the function works on copies of its operands that torch owns. The choice is made per
function, once, and shown by ``tape_info()``.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from . import _lease
from ._programs import (
    Indices,
    Tensor,
    Tensors,
)

if TYPE_CHECKING:
    from ._keep import Keep


class Cell:
    """A kept graph: edges of its outputs, and its leaves; no view of an operand."""

    def __init__(self, keep: Keep, device: torch.device) -> None:
        self.keep, self.device = keep, device
        self.outputs: list[GradientEdge | None] = []
        self.inputs: list[Tensor] = []
        """Leaves of the graph: empty shells, or torch's own copies of the operands (``owned``)."""
        self.owned = False
        self.source = Source()
        self.storages: dict[int, int] = {}
        """Address and bytes of the storages that the graph holds."""
        self.leases: list[_lease.Lease] = []
        """Replicas of modules that the graph runs again in its backward pass."""
        self.reused = False
        self.lock = threading.Lock()


class Source:
    """What saved views are rebuilt from. Apart from the cell: the graph refers to it."""

    def __init__(self) -> None:
        self.operands: Tensors = ()
        """Of the backward call under way."""
        self.versions: list[int] = []
        """Of the operands at the end of the forward pass."""

    def unchanged(self, operand: int, saved: int) -> Tensor:
        """An operand, if its version is still the one that was saved."""
        x = self.operands[operand]
        # The forward pass may still be under way.
        version = self.versions[operand] if self.versions else x._version
        if version != saved:
            raise _modified(x, saved, version)
        return x


class Hooks:
    """Packs saved tensors of one forward pass. See NOTE [What a kept graph may hold]."""

    def __init__(self, operands: Tensors, source: Source, storages: dict[int, int]) -> None:
        self.source, self.storages = source, storages
        self.operands = operands
        self.by_address = {x.data_ptr(): i for i, x in enumerate(operands) if x.numel()}

    def pack(self, t: Tensor) -> Any:
        if t.layout is not torch.strided:
            return _Saved(t, t._version)
        storage = t.untyped_storage()
        address = storage.data_ptr()
        index = self.by_address.get(address)
        if index is not None:
            x = self.operands[index]
            whole = t.shape == x.shape and t.dtype is x.dtype and t.is_contiguous()
            if whole and not (t.is_conj() or t.is_neg()):
                return _Operand(self.source, index, x._version)
            return _View(
                self.source,
                index,
                t.dtype,
                t.size(),
                t.stride(),
                t.storage_offset(),
                t.is_conj(),
                t.is_neg(),
                x._version,  # its own, or that of another tensor in the same memory
            )
        self.storages[address] = storage.nbytes()
        # With its node, an output that its own node saves would be a cycle that nobody collects.
        return _Saved(t.detach() if t.requires_grad else t, t._version)


class _Saved(NamedTuple):
    """A saved tensor of torch's own, and its version when it was saved."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        if self.tensor._version != self.version:
            raise _modified(self.tensor, self.version, self.tensor._version)
        return self.tensor


class _Operand(NamedTuple):
    """A whole operand, as it is."""

    source: Source
    operand: int
    version: int

    def unpack(self) -> Tensor:
        return self.source.unchanged(self.operand, self.version)


class _View(NamedTuple):
    """A saved view of an operand: where it lies in it."""

    source: Source
    operand: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any
    conj: bool
    neg: bool
    version: int

    def unpack(self) -> Tensor:
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


def _unpack(packed: _Saved | _Operand | _View) -> Tensor:
    return packed.unpack()


def packing(hooks: Hooks) -> saved_tensors_hooks:
    """A context in which ``hooks`` pack what autograd saves."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # loading it takes seconds
    if dynamo is not None:
        _leave_alone(dynamo)
    return saved_tensors_hooks(functools.partial(Hooks.pack, hooks), _unpack)


@functools.cache
def _leave_alone(dynamo: Any) -> None:
    """Have torch.compile not compile the hooks where a compiled function calls them."""
    for f in (Hooks.pack, Source.unchanged, _unpack, _Saved.unpack, _Operand.unpack, _View.unpack):
        dynamo.skip_code(f.__code__)


def _modified(t: Tensor, expected: int, version: int) -> RuntimeError:
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: [{t.type()} {list(t.shape)}] is at version {version}; expected version "
        f"{expected} instead."
    )


@functools.cache
def nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
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


def held(operands: Tensors, leaves: list[Tensor], wrt: Indices) -> bool:
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
