"""Programs keep the graph of a call and take it back. This file imports torch, never JAX.

A differentiated call of ``f`` is a call of ``KeepGraph(f, S)``: it returns the outputs and a token,
and keeps its autograd graph in the tape under that token. ``PullThroughGraph`` takes the graph and
runs only the backward pass. A token that is not in the tape (evicted, used up, from another
process) is a miss; ``PullThroughGraph`` then runs forward from the primals, so no result depends on
the tape. A derivative that cannot use the graph drops it by ``DropGraph``.

The NOTE in ``kept_graph.py`` says what a kept graph may hold.
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
from ..gradients import Tensor, Tensors, conj, dense, gradients_by_backward, refuses_grad
from ..modules import loans
from .kept_graph import (
    GraphPolicy,
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
    """``KeepGraph`` is ``x -> (f(x), token)``; the tape keeps the forward pass's graph for it."""

    def __init__(self, base: Program, policy: GraphPolicy) -> None:
        self.base, self.policy = base, policy

    def functional(self, *args: Tensor) -> Tensors:
        return (*self.base.functional(*args), no_token())

    graph = functional

    def run(self, *args: Tensor) -> Tensors:
        out, graph = self.forward(args)
        if graph is None:
            return (*out, tape.add_nothing(args[0].device))
        return (*out, tape.add(graph))

    def forward(self, args: Tensors) -> tuple[Tensors, KeptGraph | None]:
        """Return outputs and a graph to keep; None where the graph cannot be kept this time."""
        policy = self.policy
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(True)
        try:
            if not policy.copies:
                shapes = tuple([x.shape for x in args])
                if shapes in policy.small:
                    return self._on_copies(args, policy.small[shapes])
                try:
                    out, graph = self._on_views(args)
                except RuntimeError as error:
                    if not refuses_hooks(error):
                        raise
                    policy.copies = policy.unhooked = True
                else:
                    if graph is None:
                        gc.collect()  # the refused graph may lie in cycles, and it holds views
                    else:
                        size = sum(x.nbytes for x in args) + sum(graph.storages.values())
                        if size <= _SMALL and graph.device.type == "cpu":
                            policy.small[shapes] = size
                    return out, graph
            if not policy.unhooked:
                try:
                    return self._on_copies(args)
                except RuntimeError as error:
                    if not refuses_hooks(error):
                        raise
                    policy.unhooked = True
            return self._on_copies(args)
        finally:
            torch._C._set_grad_enabled(before)

    def _on_views(self, args: Tensors) -> tuple[Tensors, KeptGraph | None]:
        wrt = self.policy.wrt
        saved = SavedTensors(args)
        graph = KeptGraph(self.policy, args[0].device, saved)
        leaves = [x.detach() for x in args]
        for i in wrt:
            leaves[i].requires_grad_()
        with packing(saved):  # fn may run a backward pass of its own
            out = self.base.graph(*leaves)
        graph.outputs = [_edge(y) for y in out]
        graph.inputs = [leaves[i] for i in wrt]
        saved.versions = [x._version for x in args]
        saved.operands = ()
        out = _detached(out)
        # The decision is local, as another thread in this object may find something else.
        refused = loans.outstanding() or referenced_elsewhere(args, leaves, wrt)
        if refused:
            self.policy.copies = True
        # The graph's leaves are these tensor objects. They must not keep XLA's memory, not even
        # where the graph is refused and lies in a cycle.
        for leaf in leaves if refused else graph.inputs:
            leaf.data = empty(leaf.dtype, leaf.device)
        return out, None if refused else graph

    def _on_copies(self, args: Tensors, size: int | None = None) -> tuple[Tensors, KeptGraph]:
        """Run on copies of the operands; ``size`` is the graph's bytes, where they are known."""
        policy = self.policy
        saved = SavedTensors(())  # without operands it finds no view, and counts what it packs
        graph = KeptGraph(policy, args[0].device, saved)
        leaves = [x.clone() for x in args]
        for i in policy.wrt:
            leaves[i].requires_grad_()
        if policy.unhooked or size is not None:
            out = self.base.graph(*leaves)
        else:
            with packing(saved):
                out = self.base.graph(*leaves)
        graph.loans = loans.take_over()
        graph.outputs = [_edge(y) for y in out]
        graph.inputs = [leaves[i] for i in policy.wrt]
        graph.owned = True
        if size is not None:
            graph.storages[-id(graph)] = size  # this is no address of a storage
        else:
            found = saved_tensors(out) if policy.unhooked else ()
            graph.storages.update(storages_of((*leaves, *out, *found)))
        return _detached(out), graph


_SMALL = 2**16
"""Copies of so many bytes take 3 µs; hooks take 8 for one saved tensor, 4 for each further one."""


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
    """This ``Vjp`` ``(x, token, c) -> c · ∂f_D/∂x_S(x)`` pulls through the graph under the token.

    ``base`` is the ``Vjp``, or with ``batched`` its batch: every cotangent then has leading rows,
    and so have the results. ``base`` computes the same where there is no graph.
    """

    def __init__(self, base: Program, vjp: Vjp, keep: KeepGraph, batched: bool) -> None:
        self.base, self.vjp, self.keep, self.batched = base, vjp, keep, batched
        self.policy = keep.policy

    def _split(self, args: Tensors) -> tuple[Tensors, Tensor, Tensors]:
        at = len(args) - len(self.vjp.of) - 1
        return args[:at], args[at], args[at + 1 :]

    def functional(self, *args: Tensor) -> Tensors:
        primals, _, cotangents = self._split(args)
        return self.base.functional(*primals, *cotangents)

    def graph(self, *args: Tensor) -> Tensors:
        primals, _, cotangents = self._split(args)
        return self.base.graph(*primals, *cotangents)

    def run(self, *args: Tensor) -> Tensors:
        primals, token, cotangents = self._split(args)
        key = tape.name_of(token)
        graph = tape.take(key, self.policy, token.device)
        if graph is None:
            if not tape.used_up(key):
                return self.base.run(*primals, *cotangents)
            # XLA merged or hoisted the call, so the token is used again: keep what is rebuilt.
            _, graph = self.keep.forward(primals)
            if graph is None:
                return self.base.run(*primals, *cotangents)
            graph.reused = True
            tape.restore(key, graph)
        return self._pull(graph, primals, cotangents)

    def _pull(self, graph: KeptGraph, primals: Tensors, cotangents: Tensors) -> Tensors:
        seeds = conj(cotangents)
        edges = [graph.outputs[i] for i in self.vjp.of]
        if None in edges:  # some output depends on no input
            seeds = tuple(c for c, e in zip(seeds, edges, strict=True) if e is not None)
            edges = [e for e in edges if e is not None]
        grads: Sequence[Tensor | None] = [None] * len(self.policy.wrt)
        if edges:
            with graph.lock:
                graph.saved.operands = primals
                try:
                    if self.policy.seeded:
                        with seeding.lock:
                            grads = self._gradients(graph, edges, seeds)
                    else:
                        grads = self._gradients(graph, edges, seeds)
                except RuntimeError as error:
                    if not refuses_grad(error):
                        raise
                    self.policy.copies = self.policy.by_backward = True
                    return self.base.run(*primals, *cotangents)
                finally:
                    graph.saved.operands = ()
        if self.vjp.wrt != self.policy.wrt:
            by_input = dict(zip(self.policy.wrt, grads, strict=True))
            grads = [by_input[i] for i in self.vjp.wrt]
        rows = (cotangents[0].shape[0],) if self.batched else ()
        filled = [
            primals[i].new_zeros(rows + primals[i].shape) if g is None else dense(g)
            for i, g in zip(self.vjp.wrt, grads, strict=True)
        ]
        return conj(tuple(filled))

    def _gradients(
        self, graph: KeptGraph, edges: Sequence[Any], seeds: Tensors
    ) -> Sequence[Tensor | None]:
        if self.policy.by_backward and graph.owned and not (self.batched or graph.reused):
            leaves = tuple(graph.inputs)
            return gradients_by_backward(edges, leaves, seeds, roots_of(self))
        pull = pull_back_rows if self.batched else pull_back
        return pull(edges, graph.inputs, seeds, graph.reused)


class DropGraph:
    """A ``DropGraph`` takes a token before its last ``after`` operands, and drops its graph."""

    def __init__(self, base: Program, after: int, policy: GraphPolicy) -> None:
        self.base, self.after, self.policy = base, after, policy

    def _without_token(self, args: Tensors) -> Tensors:
        at = len(args) - self.after - 1
        return args[:at] + args[at + 1 :]

    def functional(self, *args: Tensor) -> Tensors:
        return self.base.functional(*self._without_token(args))

    def graph(self, *args: Tensor) -> Tensors:
        return self.base.graph(*self._without_token(args))

    def run(self, *args: Tensor) -> Tensors:
        token = args[len(args) - self.after - 1]
        tape.take(tape.name_of(token), self.policy, token.device)
        return self.base.run(*self._without_token(args))
