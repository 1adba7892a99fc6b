"""The tape: the backward pass without running the forward pass again. Imports torch, never JAX.

A differentiated call of ``f`` is a call of ``Keep(f, S)``: it returns the outputs and a token, and
keeps its autograd graph in a table under that token. ``Pull`` takes the graph and runs only the
backward pass. A token that is not in the table (evicted, used up, from another process) is a miss:
``Pull`` then runs forward from the primals, so no result depends on the table.

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
import gc
import os
import secrets
import sys
import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from . import _lease, _random
from ._callable import (
    Callable,
    Indices,
    Program,
    Tensor,
    Tensors,
    Vjp,
    Vmap,
    conj,
    gradients_by_backward,
    refuses_grad,
    roots_of,
)
from ._errors import Torch2JaxWarning

_ENVIRONMENT = f"{__name__.partition('.')[0].upper()}_TAPE_BYTES"


class Keep:
    """``x -> (f(x), token)``, with the graph of the forward pass kept under the token."""

    def __init__(self, parent: Program, wrt: Indices, label: str, seeded: bool) -> None:
        self.parent, self.wrt, self.label, self.seeded = parent, wrt, label, seeded
        self.copies = False
        """Whether the function works on copies of its operands."""
        self.unhooked = False
        """Whether it refuses hooks on saved tensors."""
        self.by_backward = False
        """Whether its graph refuses ``autograd.grad``, so that ``backward()`` must do."""

    def functional(self, *args: Tensor) -> Tensors:
        return (*self.parent.functional(*args), _no_token(args))

    graph = functional

    def run(self, *args: Tensor) -> Tensors:
        out, cell = self.forward(args)
        if cell is None:
            return (*out, _no_token(args))
        return (*out, tape.add(cell))

    def forward(self, args: Tensors) -> tuple[Tensors, _Cell | None]:
        """Outputs and a graph to keep; None where the graph cannot be kept this time."""
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(True)
        try:
            if not self.copies:
                try:
                    out, cell = self._on_views(args)
                except RuntimeError as error:
                    if not _refuses_hooks(error):
                        raise
                    self.copies = self.unhooked = True
                else:
                    if cell is None:
                        gc.collect()  # the refused graph may lie in cycles, and it holds views
                    return out, cell
            if not self.unhooked:
                try:
                    return self._on_copies(args)
                except RuntimeError as error:
                    if not _refuses_hooks(error):
                        raise
                    self.unhooked = True
            return self._on_copies(args)
        finally:
            torch._C._set_grad_enabled(before)

    def _on_views(self, args: Tensors) -> tuple[Tensors, _Cell | None]:
        cell = _Cell(self, args[0].device)
        cell.source.operands = args  # fn may run a backward pass of its own
        leaves = [x.detach() for x in args]
        for i in self.wrt:
            leaves[i].requires_grad_()
        hooks = _Hooks(args, cell.source, cell.storages)
        pack = functools.partial(_opaque(_Hooks.pack), hooks)
        with saved_tensors_hooks(pack, _opaque(_unpack)):
            out = self.parent.graph(*leaves)
        cell.outputs = [_edge(y) for y in out]
        cell.inputs = [leaves[i] for i in self.wrt]
        cell.source.versions = [x._version for x in args]
        cell.source.operands = hooks.operands = ()  # the graph keeps its hooks
        out = _detached(out)
        self.copies = _lease.held() or _held(args, leaves, self.wrt)
        # The graph's leaves are these tensor objects: they must not keep XLA's memory, nor where
        # the graph is refused and lies in a cycle.
        for leaf in leaves if self.copies else cell.inputs:
            leaf.data = _nothing(leaf.dtype, leaf.device)
        return out, None if self.copies else cell

    def _on_copies(self, args: Tensors) -> tuple[Tensors, _Cell]:
        cell = _Cell(self, args[0].device)
        leaves = [x.clone() for x in args]
        for i in self.wrt:
            leaves[i].requires_grad_()
        if self.unhooked:
            out = self.parent.graph(*leaves)
        else:  # nothing is a view of an operand here: the hooks count
            pack = functools.partial(_opaque(_Hooks.pack), _Hooks((), cell.source, cell.storages))
            with saved_tensors_hooks(pack, _opaque(_unpack)):
                out = self.parent.graph(*leaves)
        cell.leases = _lease.take()
        cell.outputs = [_edge(y) for y in out]
        cell.inputs = [leaves[i] for i in self.wrt]
        cell.owned = True
        saved = _saved_tensors(out) if self.unhooked else ()
        cell.storages.update(_storages_of((*leaves, *out, *saved)))
        return _detached(out), cell


class Pull:
    """``(x, token, c) -> c · ∂f_D/∂x_S(x)``: the ``Vjp``, by the graph under the token if there.

    ``batched``: every cotangent has leading rows, and so have the results.
    """

    def __init__(self, vjp: Vjp, keep: Keep, batched: bool, otherwise: Program) -> None:
        self.vjp, self.keep, self.batched = vjp, keep, batched
        self.otherwise = otherwise

    def _untaped(self, args: Tensors) -> tuple[Tensors, Tensor, Tensors]:
        at = len(args) - len(self.vjp.of) - 1
        return args[:at], args[at], args[at + 1 :]

    def functional(self, *args: Tensor) -> Tensors:
        primals, _, cotangents = self._untaped(args)
        return self.otherwise.functional(*primals, *cotangents)

    def graph(self, *args: Tensor) -> Tensors:
        primals, _, cotangents = self._untaped(args)
        return self.otherwise.graph(*primals, *cotangents)

    def run(self, *args: Tensor) -> Tensors:
        primals, token, cotangents = self._untaped(args)
        key = tuple(token.tolist())
        cell = tape.take(key, self.keep, token.device)
        if cell is None:
            if not tape.used_up(key):
                return self.otherwise.run(*primals, *cotangents)
            # Merged or hoisted by XLA, and used again: keep what is rebuilt for the next use.
            _, cell = self.keep.forward(primals)
            if cell is None:
                return self.otherwise.run(*primals, *cotangents)
            cell.reused = True
            tape.restore(key, cell)
        return self._pull(cell, primals, cotangents)

    def _pull(self, cell: _Cell, primals: Tensors, cotangents: Tensors) -> Tensors:
        seeds = conj(cotangents)
        edges = tuple(cell.outputs[i] for i in self.vjp.of)
        if None in edges:  # an output that depends on no input
            seeds = tuple(c for c, e in zip(seeds, edges, strict=True) if e is not None)
            edges = tuple(e for e in edges if e is not None)
        grads: Sequence[Tensor | None] = [None] * len(self.keep.wrt)
        if edges:
            with cell.lock:
                cell.source.operands = primals
                try:
                    if self.keep.seeded:  # a checkpointed block draws again in its backward pass
                        with _random.lock:
                            grads = self._gradients(cell, edges, seeds)
                    else:
                        grads = self._gradients(cell, edges, seeds)
                except RuntimeError as error:
                    if not refuses_grad(error):
                        raise
                    self.keep.copies = self.keep.by_backward = True
                    return self.otherwise.run(*primals, *cotangents)
                finally:
                    cell.source.operands = ()
        if self.vjp.wrt != self.keep.wrt:
            by_input = dict(zip(self.keep.wrt, grads, strict=True))
            grads = [by_input[i] for i in self.vjp.wrt]
        rows = (cotangents[0].shape[0],) if self.batched else ()
        return conj(
            primals[i].new_zeros(rows + primals[i].shape) if g is None else g
            for i, g in zip(self.vjp.wrt, grads, strict=True)
        )

    def _gradients(
        self, cell: _Cell, edges: tuple[Any, ...], seeds: Tensors
    ) -> Sequence[Tensor | None]:
        if self.keep.by_backward and cell.owned and not (self.batched or cell.reused):
            leaves = tuple(cell.inputs)
            return gradients_by_backward(edges, leaves, seeds, roots_of(self.keep))
        if not self.batched:
            # torch.autograd.grad without its checks of shapes, which are the handler's.
            return _run_backward(
                edges,
                seeds,
                cell.reused,
                False,
                tuple(cell.inputs),
                allow_unreachable=True,
                accumulate_grad=False,
            )
        return torch.autograd.grad(
            edges,
            cell.inputs,
            seeds,
            allow_unused=True,
            retain_graph=cell.reused,
            is_grads_batched=True,
        )


_run_backward = torch.autograd.Variable._execution_engine.run_backward  # type: ignore[attr-defined]


class Popped:
    """A program that takes a token before its last ``after`` operands, and drops its graph."""

    def __init__(self, program: Program, after: int, keep: Keep) -> None:
        self.program, self.after, self.keep = program, after, keep

    def _without_token(self, args: Tensors) -> Tensors:
        at = len(args) - self.after - 1
        return args[:at] + args[at + 1 :]

    def functional(self, *args: Tensor) -> Tensors:
        return self.program.functional(*self._without_token(args))

    def graph(self, *args: Tensor) -> Tensors:
        return self.program.graph(*self._without_token(args))

    def run(self, *args: Tensor) -> Tensors:
        token = args[len(args) - self.after - 1]
        tape.take(tuple(token.tolist()), self.keep, token.device)
        return self.program.run(*self._without_token(args))


def keepable(callable: Callable) -> bool:
    """Whether graphs of this callable are kept: the user's function and its batched form."""
    while isinstance(callable.program, Vmap) and callable.parent is not None:
        callable = callable.parent
    return callable.options.tape and callable.parent is None


def is_keep(callable: Callable) -> bool:
    """Whether this callable returns a token as its last output."""
    return isinstance(callable.program, Keep)


def is_vjp(callable: Callable) -> bool:
    """Whether this callable is a pullback."""
    return isinstance(callable.program, Vjp)


def kept(callable: Callable, wrt: Indices) -> Callable:
    """``x -> (outputs, token)``: the call that keeps its graph for derivatives in ``wrt``."""
    label = callable.options.label + callable.path
    child = callable.derive(
        f"/keep({','.join(map(str, wrt))})",
        lambda: Keep(callable.program, wrt, label, callable.options.rng is not None),
        list(callable.inputs),
        [*callable.outputs, "the token"],
    )
    if "forget" not in child.memo:
        # When no wrapper and no executable is left, nor are graphs whose backward never ran.
        child.memo["forget"] = weakref.finalize(child, tape.forget, id(child.program))
        child.memo["forget"].atexit = False
    return child


def with_token(callable: Callable, after: int, keep: Callable) -> Callable:
    """``callable``, a derivative, with a token of ``keep`` before its last ``after`` operands."""
    at = len(callable.inputs) - after
    program: Any = callable.program
    batched = isinstance(program, Vmap)
    vjp = program.parent if batched else program
    assert isinstance(keep.program, Keep)
    keeper = keep.program

    def make() -> Program:
        if isinstance(vjp, Vjp):
            dims = vjp.split(program.dims) if batched else ((), ())
            if all(d is None for d in dims[0]) and all(d == 0 for d in dims[1]):
                return Pull(vjp, keeper, batched, program)
        return Popped(program, after, keeper)

    inputs = [*callable.inputs[:at], "the token", *callable.inputs[at:]]
    suffix = f"/tape({','.join(map(str, keeper.wrt))})"
    child = callable.derive(suffix, make, inputs, list(callable.outputs))
    child.keep = keep  # the graphs of a token are found by the program that kept them
    return child


# --- saved tensors -----------------------------------------------------------------------------


class _Cell:
    """A kept graph: edges of its outputs, and its leaves; no view of an operand."""

    def __init__(self, keep: Keep, device: torch.device) -> None:
        self.keep, self.device = keep, device
        self.outputs: list[GradientEdge | None] = []
        self.inputs: list[Tensor] = []
        """Leaves of the graph: empty shells, or torch's own copies of the operands (``owned``)."""
        self.owned = False
        self.source = _Source()
        self.storages: dict[int, int] = {}
        """Address and bytes of the storages that the graph holds."""
        self.leases: list[_lease.Lease] = []
        """Replicas of modules that the graph runs again in its backward pass."""
        self.reused = False
        self.lock = threading.Lock()


class _Source:
    """What saved views are rebuilt from. Apart from the cell: the graph refers to it."""

    def __init__(self) -> None:
        self.operands: Tensors = ()
        """Of the backward call under way."""
        self.versions: list[int] = []
        """Of the operands at the end of the forward pass."""

    def version(self, operand: int) -> int:
        """Of an operand: the forward pass may still be under way."""
        return self.versions[operand] if self.versions else self.operands[operand]._version


class _Hooks:
    """Packs saved tensors of one forward pass. See NOTE [What a kept graph may hold]."""

    def __init__(self, operands: Tensors, source: _Source, storages: dict[int, int]) -> None:
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

    source: _Source
    operand: int
    version: int

    def unpack(self) -> Tensor:
        x = self.source.operands[self.operand]
        version = self.source.version(self.operand)
        if version != self.version:
            raise _modified(x, self.version, version)
        return x


class _View(NamedTuple):
    """A saved view of an operand: where it lies in it."""

    source: _Source
    operand: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any
    conj: bool
    neg: bool
    version: int

    def unpack(self) -> Tensor:
        x = self.source.operands[self.operand]
        version = self.source.version(self.operand)
        if version != self.version:
            raise _modified(x, self.version, version)
        if x.dtype is self.dtype:
            t = x.as_strided(self.size, self.stride, self.offset)
        else:
            t = torch.empty(0, dtype=self.dtype, device=x.device)
            t = t.set_(x.untyped_storage(), self.offset, self.size, self.stride)
        t = t.conj() if self.conj else t
        return torch._neg_view(t) if self.neg else t


def _refuses_hooks(error: RuntimeError) -> bool:
    """Whether a function cannot run under hooks on saved tensors.

    ``torch.func.grad`` inside it says so; a checkpoint under vmap saves tensors without storage.
    """
    return "saved tensor hooks" in str(error) or "BatchedTensorImpl" in str(error)


def _unpack(packed: _Saved | _Operand | _View) -> Tensor:
    return packed.unpack()


def _opaque(hook: Any) -> Any:
    """A hook that torch.compile does not try to compile where a compiled function calls it."""
    dynamo = sys.modules.get("torch._dynamo")  # loading it takes seconds: only where it is in use
    if dynamo is None:
        return hook
    if hook not in _disabled:
        _disabled[hook] = dynamo.disable(hook)
    return _disabled[hook]


_disabled: dict[Any, Any] = {}


def _modified(t: Tensor, expected: int, version: int) -> RuntimeError:
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: [{t.type()} {list(t.shape)}] is at version {version}; expected version "
        f"{expected} instead."
    )


def _edge(y: Tensor) -> GradientEdge | None:
    if not y.requires_grad:
        return None
    node = y.grad_fn
    return get_gradient_edge(y) if node is None else GradientEdge(node, y.output_nr)


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


def _storages_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address and bytes of the storages; wrappers of ``torch.func`` have none."""
    found = {}
    for x in tensors:
        with contextlib.suppress(RuntimeError):
            if size := (storage := x.untyped_storage()).nbytes():
                found[storage.data_ptr()] = size
    return found


def _saved_tensors(out: Tensors) -> Iterator[Tensor]:
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


def _detached(out: Tensors) -> Tensors:
    return tuple(y.detach() for y in out)


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


def _held(operands: Tensors, leaves: list[Tensor], wrt: Indices) -> bool:
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


# --- the table ---------------------------------------------------------------------------------

Token = tuple[int, ...]


def _no_token(args: Tensors) -> Tensor:
    return torch.zeros(4, dtype=torch.uint32, device=args[0].device)


_NO_TOKEN = (0, 0, 0, 0)


@dataclass
class TapeInfo:
    """What the tape holds and has done in this process.

    Attributes:
      entries: graphs that are kept now.
      bytes: of their activations.
      budget: bytes that may be kept on each device; None for a quarter of its memory.
      hits: backward passes that found their graph.
      misses: backward passes that ran forward again.
      evictions: graphs that were dropped for the budget.
      on_copies: functions whose graphs cannot be kept on views of XLA's memory: their operands
        are copied.
    """

    entries: int = 0
    bytes: int = 0
    budget: int | None = None
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    on_copies: list[str] = field(default_factory=list)


class Tape:
    """Kept graphs by token, the least recently used first."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._cells: OrderedDict[Token, _Cell] = OrderedDict()
        self._storages: dict[tuple[torch.device, int], tuple[int, int]] = {}
        """How many graphs hold a storage, and its bytes: what several hold counts once."""
        self._bytes: Counter[torch.device] = Counter()
        self._used: OrderedDict[Token, None] = OrderedDict()
        self._fresh: dict[torch.device, list[tuple[Token, Tensor]]] = {}
        self._nonce = secrets.randbits(63) + 1
        self._count = 0
        given = os.environ.get(_ENVIRONMENT)
        self._budget: int | None = int(given) if given else None
        self._hits = self._misses = self._evictions = 0
        self._copying: dict[str, None] = {}

    def add(self, cell: _Cell) -> Tensor:
        """Keep ``cell``; a tensor with the words of its token."""
        with self._lock:
            token, words = self._new_token(cell.device)
            self.restore(token, cell)
            return words

    def _new_token(self, device: torch.device) -> tuple[Token, Tensor]:
        # Tensors are made in blocks: one alone costs microseconds.
        fresh = self._fresh.setdefault(device, [])
        if not fresh:
            high, low = self._nonce >> 32, self._nonce & 0xFFFFFFFF
            counts = range(self._count, self._count + 64)
            self._count += 64
            tokens = [(high, low, n >> 32, n & 0xFFFFFFFF) for n in counts]
            block = torch.tensor(tokens, dtype=torch.uint32, device=device)
            fresh.extend(zip(tokens, block.unbind(), strict=True))
        return fresh.pop()

    def restore(self, token: Token, cell: _Cell) -> None:
        """Keep ``cell`` under ``token``, and evict what is beyond the budget."""
        with self._lock:
            if cell.keep.copies:
                self._copying[cell.keep.label] = None
            if cell.reused:
                # One graph that is used again and again is kept per function, the latest.
                same = [t for t, c in self._cells.items() if c.reused and c.keep is cell.keep]
                for other in same:
                    self._remove(other)
            self._cells[token] = cell
            device = cell.device
            for address, size in cell.storages.items():
                # An address may have been another storage's before: the larger size counts.
                held, counted = self._storages.get((device, address), (0, 0))
                self._storages[device, address] = held + 1, max(size, counted)
                self._bytes[device] += max(size - counted, 0)
            self._evict(device)

    def _evict(self, device: torch.device) -> None:
        budget = default_budget(device) if self._budget is None else self._budget
        while self._bytes[device] > budget:
            oldest = next(t for t, c in self._cells.items() if c.device == device)
            self._remove(oldest)
            self._evicted(budget)

    def take(self, token: Token, keep: Keep, device: torch.device) -> _Cell | None:
        """The graph under ``token``, if it is there and is of ``keep`` on ``device``."""
        if token == _NO_TOKEN:
            return None
        with self._lock:
            cell = self._cells.get(token)
            if cell is None or cell.keep is not keep or cell.device != device:
                self._misses += 1
                return None
            self._hits += 1
            if cell.reused:
                self._cells.move_to_end(token)
                return cell
            self._remove(token)
            self._used[token] = None
            if len(self._used) > 4096:
                self._used.popitem(last=False)
            return cell

    def used_up(self, token: Token) -> bool:
        """Whether this token's graph was taken before, rather than evicted or unknown."""
        return token in self._used

    def clear(self) -> None:
        with self._lock:
            for token in list(self._cells):
                self._remove(token)
            self._used.clear()

    def forget(self, keep: int) -> None:
        """Drop the graphs of the ``Keep`` with this id, whose callable is gone."""
        with self._lock:
            for token in [t for t, c in self._cells.items() if id(c.keep) == keep]:
                self._remove(token)

    def set_budget(self, budget: int | None) -> None:
        with self._lock:
            self._budget = budget
            for device in list(self._bytes):
                self._evict(device)

    def info(self) -> TapeInfo:
        with self._lock:
            return TapeInfo(
                len(self._cells),
                sum(self._bytes.values()),
                self._budget,
                self._hits,
                self._misses,
                self._evictions,
                list(self._copying),
            )

    def _remove(self, token: Token) -> None:
        cell = self._cells.pop(token, None)
        if cell is None:  # freeing another graph has freed the callable of this one
            return
        device = cell.device
        for address in cell.storages:
            held, counted = self._storages.pop((device, address))
            if held > 1:
                self._storages[device, address] = held - 1, counted
            else:
                self._bytes[device] -= counted

    def _evicted(self, budget: int) -> None:
        self._evictions += 1
        if self._evictions == 1 and budget > 0:
            warnings.warn(
                f"The tape holds more than its budget of {budget:,} bytes, so the oldest forward "
                "passes are dropped and their backward passes run forward again. Differentiate "
                "less at once, or raise the budget with set_tape_budget() or the environment "
                f"variable {_ENVIRONMENT}.",
                Torch2JaxWarning,
                stacklevel=2,
            )


@functools.cache
def default_budget(device: torch.device) -> int:
    """A quarter of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


tape = Tape()


def tape_info() -> TapeInfo:
    """What the tape holds: entries, bytes, budget; hits, misses and evictions so far.

    Examples:
      >>> tape_info().entries
      0
    """
    return tape.info()


def clear_tape() -> None:
    """Drop every kept graph. Backward passes that need one run forward again.

    Examples:
      >>> clear_tape()
    """
    tape.clear()


def set_tape_budget(bytes: int | None) -> None:
    """Bytes of activations that the tape keeps on each device; None: a quarter of its memory.

    0 keeps nothing: every backward pass runs forward again.

    Examples:
      >>> set_tape_budget(2**30)
      >>> set_tape_budget(None)
    """
    if bytes is not None and (not isinstance(bytes, int) or bytes < 0):
        raise ValueError(f"a tape budget is a number of bytes or None, got {bytes!r}")
    tape.set_budget(bytes)
