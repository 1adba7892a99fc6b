"""Programs that keep the graph of a call and take it back. Imports torch, never JAX.

A differentiated call of ``f`` is a call of ``KeepGraph(f, S)``: it returns the outputs and a token,
and keeps its autograd graph in the tape under that token. ``PullThroughGraph`` takes the graph and
runs only the backward pass. A token that is not in the tape (evicted, used up, from another
process) is a miss: ``PullThroughGraph`` then runs forward from the primals, so no result depends on
the tape.

What a kept graph may hold: see the NOTE in ``kept_graph.py``.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ...._compat.torch import pull_back, pull_back_rows, python_node
from .. import seeding
from ..derivatives import Program, Vjp, roots_of
from ..gradients import Indices, Tensor, Tensors, conj, gradients_by_backward, refuses_grad
from ..modules import loans
from .kept_graph import (
    KeptGraph,
    SavedTensors,
    empty,
    packing,
    referenced_elsewhere,
    refuses_hooks,
    saved_tensors,
    storages_of,
)
from .table import no_token, tape


class KeepGraph:
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
        out, graph = self.forward(args)
        if graph is None:
            return (*out, no_token(args))
        return (*out, tape.add(graph))

    def forward(self, args: Tensors) -> tuple[Tensors, KeptGraph | None]:
        """Outputs and a graph to keep; None where the graph cannot be kept this time."""
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(True)
        try:
            if not self.copies:
                shapes = tuple([x.shape for x in args])
                if shapes in self.small:
                    return self._on_copies(args, self.small[shapes])
                try:
                    out, graph = self._on_views(args)
                except RuntimeError as error:
                    if not refuses_hooks(error):
                        raise
                    self.copies = self.unhooked = True
                else:
                    if graph is None:
                        gc.collect()  # the refused graph may lie in cycles, and it holds views
                    else:
                        size = sum(x.nbytes for x in args) + sum(graph.storages.values())
                        if size <= _SMALL and graph.device.type == "cpu":
                            self.small[shapes] = size
                    return out, graph
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

    def _on_views(self, args: Tensors) -> tuple[Tensors, KeptGraph | None]:
        source = SavedTensors(args)
        graph = KeptGraph(self, args[0].device, source)
        leaves = [x.detach() for x in args]
        for i in self.wrt:
            leaves[i].requires_grad_()
        with packing(source):  # fn may run a backward pass of its own
            out = self.parent.graph(*leaves)
        graph.outputs = [_edge(y) for y in out]
        graph.inputs = [leaves[i] for i in self.wrt]
        source.versions = [x._version for x in args]
        source.operands = ()
        out = _detached(out)
        # A local decision: another thread in this object may find something else.
        refused = loans.held() or referenced_elsewhere(args, leaves, self.wrt)
        if refused:
            self.copies = True
        # The graph's leaves are these tensor objects. They must not keep XLA's memory, not even
        # where the graph is refused and lies in a cycle.
        for leaf in leaves if refused else graph.inputs:
            leaf.data = empty(leaf.dtype, leaf.device)
        return out, None if refused else graph

    def _on_copies(self, args: Tensors, size: int | None = None) -> tuple[Tensors, KeptGraph]:
        """``size``: bytes of the graph, where they are known."""
        source = SavedTensors(())  # empty is a view of an operand here: what it packs is counted
        graph = KeptGraph(self, args[0].device, source)
        leaves = [x.clone() for x in args]
        for i in self.wrt:
            leaves[i].requires_grad_()
        if self.unhooked or size is not None:
            out = self.parent.graph(*leaves)
        else:
            with packing(source):
                out = self.parent.graph(*leaves)
        graph.leases = loans.take()
        graph.outputs = [_edge(y) for y in out]
        graph.inputs = [leaves[i] for i in self.wrt]
        graph.owned = True
        if size is not None:
            graph.storages[-id(graph)] = size  # no address of a storage
        else:
            saved = saved_tensors(out) if self.unhooked else ()
            graph.storages.update(storages_of((*leaves, *out, *saved)))
        return _detached(out), graph


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


class PullThroughGraph:
    """``(x, token, c) -> c · ∂f_D/∂x_S(x)``: the ``Vjp``, by the graph under the token if there.

    ``batched``: every cotangent has leading rows, and so have the results.
    """

    def __init__(self, vjp: Vjp, keep: KeepGraph, batched: bool, otherwise: Program) -> None:
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
        graph = tape.take(key, self.keep, token.device)
        if graph is None:
            if not tape.used_up(key):
                return self.otherwise.run(*primals, *cotangents)
            # Merged or hoisted by XLA, and used again: keep what is rebuilt for the next use.
            _, graph = self.keep.forward(primals)
            if graph is None:
                return self.otherwise.run(*primals, *cotangents)
            graph.reused = True
            tape.restore(key, graph)
        return self._pull(graph, primals, cotangents)

    def _pull(self, graph: KeptGraph, primals: Tensors, cotangents: Tensors) -> Tensors:
        seeds = conj(cotangents)
        edges = [graph.outputs[i] for i in self.vjp.of]
        if None in edges:  # an output that depends on no input
            seeds = tuple(c for c, e in zip(seeds, edges, strict=True) if e is not None)
            edges = [e for e in edges if e is not None]
        grads: Sequence[Tensor | None] = [None] * len(self.keep.wrt)
        if edges:
            with graph.lock:
                graph.source.operands = primals
                try:
                    if self.keep.seeded:  # a checkpointed block draws again in its backward pass
                        with seeding.lock:
                            grads = self._gradients(graph, edges, seeds)
                    else:
                        grads = self._gradients(graph, edges, seeds)
                except RuntimeError as error:
                    if not refuses_grad(error):
                        raise
                    self.keep.copies = self.keep.by_backward = True
                    return self.otherwise.run(*primals, *cotangents)
                finally:
                    graph.source.operands = ()
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
        self, graph: KeptGraph, edges: Sequence[Any], seeds: Tensors
    ) -> Sequence[Tensor | None]:
        if self.keep.by_backward and graph.owned and not (self.batched or graph.reused):
            leaves = tuple(graph.inputs)
            return gradients_by_backward(edges, leaves, seeds, roots_of(self.keep))
        pull = pull_back_rows if self.batched else pull_back
        return pull(edges, graph.inputs, seeds, graph.reused)


class DropGraph:
    """A program that takes a token before its last ``after`` operands, and drops its graph."""

    def __init__(self, program: Program, after: int, keep: KeepGraph) -> None:
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
