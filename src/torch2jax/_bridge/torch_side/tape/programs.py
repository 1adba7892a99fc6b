"""Programs that keep the graph of a call and take it back. Imports torch, never JAX.

A differentiated call of ``f`` is a call of ``Keep(f, S)``: it returns the outputs and a token, and
keeps its autograd graph in the tape under that token. ``Pull`` takes the graph and runs only the
backward pass. A token that is not in the tape (evicted, used up, from another process) is a miss:
``Pull`` then runs forward from the primals, so no result depends on the tape.

What a kept graph may hold: see the NOTE in ``_saved.py``.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ...._compat.torch import pull_back, pull_back_rows, python_node
from .. import random
from ..derivatives import Program, Vjp, roots_of
from ..gradients import Indices, Tensor, Tensors, conj, gradients_by_backward, refuses_grad
from ..modules import loans
from .kept_graph import (
    Cell,
    Source,
    held,
    nothing,
    packing,
    refuses_hooks,
    saved_tensors,
    storages_of,
)
from .table import no_token, tape


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
        self.small: dict[tuple[torch.Size, ...], int] = {}
        """Shapes of operands whose copies cost less than hooks, and the bytes of their graph."""

    def functional(self, *args: Tensor) -> Tensors:
        return (*self.parent.functional(*args), no_token(args))

    graph = functional

    def run(self, *args: Tensor) -> Tensors:
        out, cell = self.forward(args)
        if cell is None:
            return (*out, no_token(args))
        return (*out, tape.add(cell))

    def forward(self, args: Tensors) -> tuple[Tensors, Cell | None]:
        """Outputs and a graph to keep; None where the graph cannot be kept this time."""
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(True)
        try:
            if not self.copies:
                shapes = tuple([x.shape for x in args])
                if shapes in self.small:
                    return self._on_copies(args, self.small[shapes])
                try:
                    out, cell = self._on_views(args)
                except RuntimeError as error:
                    if not refuses_hooks(error):
                        raise
                    self.copies = self.unhooked = True
                else:
                    if cell is None:
                        gc.collect()  # the refused graph may lie in cycles, and it holds views
                    else:
                        size = sum(x.nbytes for x in args) + sum(cell.storages.values())
                        if size <= _SMALL and cell.device.type == "cpu":
                            self.small[shapes] = size
                    return out, cell
            if not self.unhooked:
                try:
                    return self._on_copies(args)
                except RuntimeError as error:
                    if not refuses_hooks(error):
                        raise
                    self.unhooked = True
            return self._on_copies(args)
        finally:
            torch._C._set_grad_enabled(before)

    def _on_views(self, args: Tensors) -> tuple[Tensors, Cell | None]:
        source = Source(args)
        cell = Cell(self, args[0].device, source)
        leaves = [x.detach() for x in args]
        for i in self.wrt:
            leaves[i].requires_grad_()
        with packing(source):  # fn may run a backward pass of its own
            out = self.parent.graph(*leaves)
        cell.outputs = [_edge(y) for y in out]
        cell.inputs = [leaves[i] for i in self.wrt]
        source.versions = [x._version for x in args]
        source.operands = ()
        out = _detached(out)
        self.copies = loans.held() or held(args, leaves, self.wrt)
        # The graph's leaves are these tensor objects: they must not keep XLA's memory, nor where
        # the graph is refused and lies in a cycle.
        for leaf in leaves if self.copies else cell.inputs:
            leaf.data = nothing(leaf.dtype, leaf.device)
        return out, None if self.copies else cell

    def _on_copies(self, args: Tensors, size: int | None = None) -> tuple[Tensors, Cell]:
        """``size``: bytes of the graph, where they are known."""
        source = Source(())  # nothing is a view of an operand here: what it packs is counted
        cell = Cell(self, args[0].device, source)
        leaves = [x.clone() for x in args]
        for i in self.wrt:
            leaves[i].requires_grad_()
        if self.unhooked or size is not None:
            out = self.parent.graph(*leaves)
        else:
            with packing(source):
                out = self.parent.graph(*leaves)
        cell.leases = loans.take()
        cell.outputs = [_edge(y) for y in out]
        cell.inputs = [leaves[i] for i in self.wrt]
        cell.owned = True
        if size is not None:
            cell.storages[-id(cell)] = size  # no address of a storage
        else:
            saved = saved_tensors(out) if self.unhooked else ()
            cell.storages.update(storages_of((*leaves, *out, *saved)))
        return _detached(out), cell


_SMALL = 2**16
"""Bytes. Copies of these take 3 µs; hooks 8 for one saved tensor, 4 for each further one."""


def _edge(y: Tensor) -> GradientEdge | None:
    if not y.requires_grad:
        return None
    node = y.grad_fn
    if isinstance(node, python_node):
        y = y.view_as(y)
        node = y.grad_fn
    return get_gradient_edge(y) if node is None else GradientEdge(node, y.output_nr)


def _detached(out: Tensors) -> Tensors:
    return tuple([y.detach() for y in out])


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

    def _pull(self, cell: Cell, primals: Tensors, cotangents: Tensors) -> Tensors:
        seeds = conj(cotangents)
        edges = [cell.outputs[i] for i in self.vjp.of]
        if None in edges:  # an output that depends on no input
            seeds = tuple(c for c, e in zip(seeds, edges, strict=True) if e is not None)
            edges = [e for e in edges if e is not None]
        grads: Sequence[Tensor | None] = [None] * len(self.keep.wrt)
        if edges:
            with cell.lock:
                cell.source.operands = primals
                try:
                    if self.keep.seeded:  # a checkpointed block draws again in its backward pass
                        with random.lock:
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
        filled = [
            primals[i].new_zeros(rows + primals[i].shape) if g is None else g
            for i, g in zip(self.vjp.wrt, grads, strict=True)
        ]
        return conj(tuple(filled))

    def _gradients(
        self, cell: Cell, edges: Sequence[Any], seeds: Tensors
    ) -> Sequence[Tensor | None]:
        if self.keep.by_backward and cell.owned and not (self.batched or cell.reused):
            leaves = tuple(cell.inputs)
            return gradients_by_backward(edges, leaves, seeds, roots_of(self.keep))
        pull = pull_back_rows if self.batched else pull_back
        return pull(edges, cell.inputs, seeds, cell.reused)


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
