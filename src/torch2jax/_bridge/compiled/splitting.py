"""A forward graph returns what its backward graph needs. This file imports torch, never JAX.

PyTorch's own partitioner splits the joint graph of a function and its pullback. Residuals are
results of the forward call and operands of the backward call, like any other value of XLA's: there
is no tape. An operand, or a view of one or of another residual, is no residual; the backward pass
has it from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..torch_side.derivatives import Program
from ..torch_side.gradients import Indices, conj, leaf_gradients, take
from ..torch_side.inference import Spec
from .graphs import (
    Graph,
    NotCompiled,
    Surroundings,
    carried,
    restored,
    results_of,
    run_graph,
    run_node,
    trace,
    value_of,
    view_base,
)

Tensor = torch.Tensor
Tensors = tuple[Tensor, ...]


class Split:
    """A split is a function with its pullback as two graphs.

    forward: operands -> outputs, residuals
    backward: operands, residuals, cotangents of ``of`` -> cotangents of ``wrt``
    """

    def __init__(self, graph: Graph, operands: int, outputs: int, wrt: Indices, of: Indices):
        self.wrt, self.of = wrt, of
        self._operands, self._outputs = operands, outputs
        self._constants = graph.constants
        self._cotangents = graph.operands[operands:]
        self._forward, self._backward = _partitioned(graph, operands, outputs)
        results = list(results_of(self._forward))
        self._saved = results[outputs:]
        roots = [view_base(node) for node in self._saved]
        self._roots = list(dict.fromkeys(r for r in roots if r.op != "placeholder"))
        self._specs = [Spec(tuple(t.shape), t.dtype, t.device) for t in map(value_of, self._roots)]
        output = next(iter(self._forward.graph.find_nodes(op="output")))
        output.args = ((*results[:outputs], *self._roots),)
        self._forward.recompile()

    @property
    def residuals(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Return shapes and dtypes of the residuals, as XLA carries them."""
        with torch.device("meta"):
            made = [carried(torch.empty(s.shape, dtype=s.dtype)) for s in self._specs]
        return tuple((tuple(t.shape), t.dtype) for t in made)

    def forward(self, *operands: Tensor) -> Tensors:
        """Return the outputs and the residuals."""
        given = self._named(operands)
        places = self._forward.graph.find_nodes(op="placeholder")
        out = run_graph(self._forward, [given[p.name] for p in places])
        return (*out[: self._outputs], *map(carried, out[self._outputs :]))

    def backward(self, *args: Tensor) -> Tensors:
        """Return the cotangents of ``wrt``."""
        n, m = self._operands, self._operands + len(self._roots)
        values: dict[Any, Tensor] = {
            root: restored(x, spec)
            for root, x, spec in zip(self._roots, args[n:m], self._specs, strict=True)
        }
        given = self._named(args[:n])
        given.update((f"tangents_{i}", c) for i, c in enumerate(args[m:]))
        for place in self._forward.graph.find_nodes(op="placeholder"):
            values[place] = given[place.name]
        for node in self._saved:
            given[node.name] = run_node(node, values)
        places = self._backward.graph.find_nodes(op="placeholder")
        return run_graph(self._backward, [given[p.name] for p in places])

    def zeros(self, i: int) -> Tensor:
        """Return a cotangent of zero for the output ``of[i]``."""
        spec = self._cotangents[i]
        return torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device)

    def _named(self, operands: Sequence[Tensor]) -> dict[str, Tensor]:
        return {f"primals_{i}": x for i, x in enumerate((*operands, *self._constants))}


def split(
    program: Program, specs: Sequence[Spec], wrt: Indices, of: Indices, around: Surroundings
) -> Split | None:
    """Split ``program`` on operands of these specs; None where PyTorch cannot trace it jointly."""
    outputs = 0

    def joint(*args: Tensor) -> Tensors:
        nonlocal outputs
        primals, cotangents = args[: len(specs)], args[len(specs) :]
        with torch.enable_grad():
            leaves = list(primals)
            for i in wrt:
                leaves[i] = leaves[i].detach().requires_grad_()
            out = program.graph(*leaves)
            outputs = len(out)
            grads = leaf_gradients(take(out, of), take(leaves, wrt), conj(cotangents))
        return (*(y.detach() for y in out), *conj(grads))

    try:
        out = trace(program.graph, specs, around).results
        graph = trace(joint, [*specs, *take(out, of)], around)
    except NotCompiled:
        return None
    return Split(graph, len(specs), outputs, wrt, of)


def _partitioned(graph: Graph, operands: int, outputs: int) -> tuple[Any, Any]:
    """Return the forward and the backward graph of a joint one."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    # The partitioner tells operands apart by their names. Constants are primals.
    module = graph.module
    places = list(module.graph.find_nodes(op="placeholder"))
    end = len(graph.operands)
    primals = [*places[:operands], *places[end:]]
    order = [*primals, *places[operands:end]]
    for i, place in enumerate(order):
        of_primals = i < len(primals)
        name = f"primals_{i}" if of_primals else f"tangents_{i - len(primals)}"
        place.target = place.name = name
    first = next(iter(module.graph.nodes))
    for place in reversed(order):
        if place is not first:
            first.prepend(place)
            first = place
    module.recompile()
    return min_cut_rematerialization_partition(
        module,
        [value_of(p) for p in order],
        num_fwd_outputs=outputs,
        static_lifetime_input_indices=[],
    )


@dataclass(frozen=True, eq=False)
class ForwardPart:
    """This program returns the outputs of ``base``, and the residuals."""

    base: Program
    split: Split

    def run(self, *operands: Tensor) -> Tensors:
        return self.split.forward(*operands)

    functional = graph = run


@dataclass(frozen=True, eq=False)
class BackwardPart:
    """This program is a pullback of ``wrt`` and ``of``, which takes residuals before cotangents."""

    base: Program
    split: Split
    wrt: Indices
    of: Indices

    def run(self, *args: Tensor) -> Tensors:
        at = len(args) - len(self.of)
        seeds = dict(zip(self.of, args[at:], strict=True))
        whole = [
            seeds[k] if k in seeds else self.split.zeros(i) for i, k in enumerate(self.split.of)
        ]
        pulled = dict(zip(self.split.wrt, self.split.backward(*args[:at], *whole), strict=True))
        return tuple(pulled[i] for i in self.wrt)

    functional = graph = run


@dataclass(frozen=True, eq=False)
class WithoutResiduals:
    """This program is ``base``, and takes residuals that it does not read."""

    base: Program
    at: int
    count: int

    def run(self, *args: Tensor) -> Tensors:
        return self.base.run(*args[: self.at], *args[self.at + self.count :])

    def functional(self, *args: Tensor) -> Tensors:
        return self.base.functional(*args[: self.at], *args[self.at + self.count :])

    graph = functional
