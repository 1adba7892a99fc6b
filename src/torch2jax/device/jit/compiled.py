"""One compiled program of a function has inputs, outputs, state, and a derivative.

NOTE [Gradients of leaves]. ``backward()`` in a compiled function makes a leaf's ``grad``, or adds
to one that is there. Which of the two happens is part of the program, so each pattern of gradients
that are there before a call has a program. The memory of ``grad`` is looked up at each call, and a
new ``grad`` is put into the leaf after it. A leaf among the arguments has no ``grad`` in the trace;
what it gets there is added after the call.

``surroundings`` handles what else the function reads and sets: attributes of modules and objects.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch.utils import _pytree as torch_tree

from ..._compat.torch import compiling
from ..._errors import Torch2JaxError
from .. import random_streams
from ..operators.constants import value_of
from ..setup.changes_of_pytorch import replacing
from ..tensors.tensor import Cell, Tensor, become, wrap, write
from ..tracing.bridged_modules import Choice, chosen_for, module_calls
from ..tracing.scope import differentiated
from .captured import MoreInputs, Watch, capturing
from .known_values import KnownValues, warn_of_changes
from .results import TENSOR, add_gradient, flatten_result
from .surroundings import Change, Surroundings

__all__ = ["CompiledCall"]


class CompiledCall:
    """A compiled call serves arguments of one structure and one pattern of leaves' gradients."""

    def __init__(
        self,
        fn: Callable[..., Any],
        spec: Any,
        statics: Any,
        metas: Any,
        options: Any,
        around: Surroundings,
    ) -> None:
        self.fn, self.spec, self.metas, self.around = fn, spec, metas, around
        self.statics = list(statics)
        self.generators: list[tuple[Any, int]] = []
        """Generators, or their places in arguments or surroundings, with their numbers of draws."""
        self.stands_for: dict[int, int] = {}
        """The argument's position, by the generator that replaces it in the trace."""
        for i, x in enumerate(statics):
            if isinstance(x, torch.Generator):
                first = next(j for j, y in enumerate(statics) if _is_same(x, y))
                new = torch.Generator(x.device) if first == i else self.statics[first]
                self.statics[i] = new
                self.stands_for[new._cdata] = first  # type: ignore[attr-defined]
        self.inputs: list[Cell] = []
        self.numbers: list[int | None] = []
        """For each input, the number of the surroundings' tensor whose memory it is, or None."""
        self.generation = -1
        self.changes: list[tuple[Change, dict[Any, Any]]] = []
        """What it sets in its surroundings; see ``_describe_changes``."""
        self.moves: list[tuple[int, int]] = []
        """Tensors of the surroundings that get other memory, each with the result that is it."""
        self.dtypes: list[torch.dtype] = []
        self.written: list[int] = []
        self.made: list[Cell] = []
        self.leaves: list[weakref.ref[Tensor]] = []
        self.of_grads: list[tuple[int, weakref.ref[Tensor]]] = []
        """Inputs that are the memory of a leaf's gradient."""
        self.new_grads: list[tuple[weakref.ref[Tensor], torch.dtype | None]] = []
        """Leaves whose gradient is another after the call, with its dtype, or None without one."""
        self.argument_grads: list[tuple[int, torch.dtype]] = []
        self.argument_writes: list[int] = []
        self.known = KnownValues()
        self.renewed = 0  # as often known values have changed
        self.others: dict[Any, CompiledCall] = {}
        self.out: Any = None
        self.grad = torch.is_grad_enabled()
        self.differentiable = False
        self.detached: frozenset[int] = frozenset()
        """Results without a graph, such as gradients."""
        self.draws = True
        self.ran = False
        self.choice: Choice | None = None
        """Which modules go through the bridge, because they ask for values."""
        self.ready = False
        donate = {"donate_argnums": (1,)} if options.pop("donate_state", False) else {}
        self.options = {**options, **donate}

    def copy(self) -> CompiledCall:
        """Return the same call, not yet compiled, for other surroundings or gradients."""
        options = dict(self.options)
        compiled = CompiledCall(self.fn, self.spec, self.statics, self.metas, options, self.around)
        compiled.stands_for, compiled.statics = self.stands_for, self.statics
        compiled.grad, compiled.differentiable = self.grad, self.differentiable
        compiled.ran, compiled.detached, compiled.leaves = self.ran, self.detached, self.leaves
        return compiled

    def release(self) -> None:
        """Keep no memory of these surroundings, because others have taken their place."""
        for compiled in {id(p): p for p in (self, *self.others.values())}.values():
            compiled.generation = -1
            for i, number in enumerate(compiled.numbers):
                if number is not None:
                    compiled.inputs[i] = None  # type: ignore[call-overload]

    def find(self) -> None:
        """Look up the memory of what the function closes over."""
        tensors = self.around.tensors
        for i, number in enumerate(self.numbers):
            if number is not None:
                self.inputs[i] = tensors[number]._cell
        self.generation = self.around.generation

    def renew(self) -> None:
        """Trace the function again at the next call."""
        self.ready, self.of_grads = False, []
        self.renewed += 1
        if self.renewed == 3:
            warn_of_changes(getattr(self.fn, "__name__", type(self.fn).__name__))

    def lost(self) -> bool:
        """Say whether a leaf is gone, so that gradients belong to other leaves now."""
        return any(ref() is None for ref in self.leaves)

    def words(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the words of this call from each generator."""
        return [
            random_streams.words_of(self._generator(source, leaves), count)
            for source, count in self.generators
        ]

    def _generator(self, source: Any, leaves: Sequence[Any]) -> Any:
        if not isinstance(source, tuple):
            return source
        kind, i = source
        return leaves[i] if kind == "argument" else self.around.generators[i]

    # --- leaves and their gradients

    def note(self, leaves: Sequence[Tensor], arguments: Sequence[Tensor]) -> None:
        """Note the leaves that the function closes over."""
        known = {id(x) for x in (*arguments, *self.living())}
        needed = [x for x in leaves if x.requires_grad and id(x) not in known]
        self.leaves += map(weakref.ref, needed)

    def living(self) -> list[Tensor]:
        found = (ref() for ref in self.leaves)
        return [x for x in found if x is not None and x.requires_grad and x.is_leaf]

    def here(self) -> CompiledCall:
        """Return the compiled call for the leaves that have gradients now."""
        have = tuple((id(x), x.grad is not None) for x in self.living())
        compiled = self.others.get(have)
        if compiled is None:
            compiled = self
            if self.others:
                compiled = self.copy()
            self.others[have] = compiled
        if compiled.generation != self.around.generation:
            compiled.find()
        for i, ref in compiled.of_grads:
            leaf = ref()
            if leaf is not None and leaf.grad is not None:
                compiled.inputs[i] = leaf.grad._cell  # type: ignore[attr-defined]
        return compiled

    # --- the traced function

    def run(self, arrays: Any, state: Any, words: Any, drawn: Any) -> Any:
        """Return results, new state, and (memory made, gradients, arguments written to)."""
        saved = self.around.save()
        try:
            return self._run(arrays, state, words, drawn, saved)
        finally:
            self.around.restore(saved)

    def _run(self, arrays: Any, state: Any, words: Any, drawn: Any, saved: Any) -> Any:
        before = [c.array for c in self.inputs]
        versions = [c.version for c in self.inputs]
        tensors: list[Any] = [
            wrap(a, dtype).requires_grad_(needs and not self.differentiable)
            for a, (dtype, needs, _) in zip(arrays, self.metas, strict=True)
        ]
        for x, (_, needs, _) in zip(tensors, self.metas, strict=True):
            x._cut = not needs
        slots = iter(tensors)
        leaves = [next(slots) if x is TENSOR else x for x in self.statics]
        args, kwargs = torch_tree.tree_unflatten(leaves, self.spec)
        scope = differentiated() if self.differentiable else replacing()
        grads = [(x, x.grad) for x in self.living()]
        sources = [self._generator(source, self.statics) for source, _ in self.generators]
        draws = random_streams.Draws(
            {g._cdata: rows for g, rows in zip(sources, drawn, strict=True)}
        )
        seeds = [g.get_state() for g in sources]
        try:
            for cell, array in zip(self.inputs, state, strict=True):
                cell.array = array
            with capturing(self.inputs, before) as capture:
                # A trace may start inside a forward pass of autograd, where gradients are off.
                grad = torch.enable_grad if self.grad else torch.no_grad
                key = random_streams.drawing_from(words, True, draws)
                modules = module_calls(self, self.choice)
                with key as stream, scope, grad(), compiling(), Watch(), modules:
                    result = self.fn(*args, **kwargs)
                self.draws = stream is not None and stream.count > 0
                self._check_seeds(sources, seeds)
                outs, self.out = flatten_result(result)
                self._describe_changes(outs, tensors, saved)
                self.dtypes = [x.dtype for x in outs]
                results = [value_of(x) for x in outs]
                given = [(i, x.grad) for i, x in enumerate(tensors) if x.grad is not None]
                self.argument_grads = [(i, g.dtype) for i, g in given]
                changed_grads = [(x, x.grad) for x, was in grads if x.grad is not was]
                self.new_grads = [
                    (weakref.ref(x), None if g is None else g.dtype) for x, g in changed_grads
                ]
                self.argument_writes = [i for i, x in enumerate(tensors) if x._cell.version]
                new_arguments = [value_of(tensors[i]) for i in self.argument_writes]
                after = [g for _, g in (*given, *changed_grads) if g is not None]
                new_grads = [value_of(g) for g in after]  # type: ignore[arg-type]
                for x, was in grads:
                    x.grad = was
                del result, args, kwargs, tensors, slots, leaves, given, changed_grads, after
                found = [cell for cell, _ in capture.found.values()]
                changed = [
                    i
                    for i, (c, v) in enumerate(zip(self.inputs, versions, strict=True))
                    if c.version != v
                ]
                new_state = [self.inputs[i].array for i in changed]
                del outs
                made = [] if found else capture.survivors()
                new_made = [c.array for c in made]
                known = [*capture.constants.values()]
        finally:
            for x, was in grads:
                x.grad = was
            for cell, array in zip(self.inputs, before, strict=True):
                cell.array = array
        if found or set(draws.counts) != {g._cdata for g in sources}:
            raise MoreInputs(found, draws)
        self.written, self.made = changed, made
        self.known = KnownValues(known, self.around.numbers() if known else None)
        return results, new_state, (new_made, new_grads, new_arguments)

    def _check_seeds(self, generators: Sequence[Any], before: Sequence[Any]) -> None:
        for g, was in zip(generators, before, strict=True):
            if not torch.equal(g.get_state(), was):
                raise Torch2JaxError(
                    "a function that is compiled for device jax seeds a torch.Generator, or draws "
                    "from it on the CPU: that would happen once, not at each call. Do it outside "
                    'of the function, or draw with device="jax".'
                )

    def _describe_changes(self, outs: list[Tensor], arguments: Any, saved: Any) -> None:
        """Describe what the trace has set in the surroundings, and make new tensors results."""
        known = {id(t): ("known", n) for n, (t, *_) in enumerate(saved[1])}
        known |= {id(x): ("argument", i) for i, x in enumerate(arguments)}
        known |= {id(x): ("result", i) for i, x in enumerate(outs)}

        def described(value: Any) -> Any:
            leaves, spec = torch_tree.tree_flatten(value)
            marks: list[Any] = []
            for x in leaves:
                if not isinstance(x, Tensor):
                    marks.append((None, x))
                elif id(x) in known:
                    marks.append(known[id(x)])
                else:
                    marks.append(known.setdefault(id(x), ("result", len(outs))))
                    outs.append(x)
                    if x.requires_grad and x.is_leaf:
                        marks[-1] = ("leaf", (len(outs) - 1, getattr(x, "_is_param", False)))
            return spec, marks

        self.moves = []
        for n, t in self.around.moved(saved):
            self.moves.append((n, len(outs)))
            outs.append(t.detach())  # type: ignore[arg-type]
        self.changes = [
            (Change(c.container, {}, c.gone), {k: described(v) for k, v in c.new.items()})
            for c in self.around.changes(saved)
            if not self.around.is_volatile(c)
        ]

    def set_surroundings(self, tensors: Sequence[Tensor], outs: Sequence[Any]) -> None:
        """After a call, put into the surroundings what the function puts there."""
        around = self.around
        for n, i in self.moves:
            become(around.tensors[n], outs[i].detach())

        def made(mark: Any) -> Any:
            kind, x = mark
            if kind == "known":
                return around.tensors[x]
            if kind == "leaf":
                i, is_param = x
                new = outs[i].detach().requires_grad_()
                if is_param:
                    new._is_param = True
                return new
            return x if kind is None else (tensors if kind == "argument" else outs)[x]

        values = [
            {k: torch_tree.tree_unflatten(list(map(made, m)), s) for k, (s, m) in new.items()}
            for _, new in self.changes
        ]
        for (change, _), new in zip(self.changes, values, strict=True):
            around.put(change, new)

    def prepare(self, arrays: Any) -> None:
        """Trace the function until no more is found that it closes over."""
        run = functools.partial(self.run)  # JAX looks up traces by function
        no_words = random_streams.NO_WORDS
        self.generators = []  # of an earlier trace, before more modules went through the bridge
        while True:
            state = [c.array for c in self.inputs]
            drawn = [np.zeros((count, 2), np.uint32) for _, count in self.generators]
            try:
                jax.eval_shape(run, arrays, state, no_words, drawn)
                break
            except MoreInputs as more:
                more.check([source for source, _ in self.generators])
                self.inputs += more.cells
                numbers = self.around.numbers()
                self.numbers += [numbers.get(id(c)) for c in more.cells]
                known = {g._cdata: ("place", n) for n, g in enumerate(self.around.generators)}
                known |= {which: ("argument", i) for which, i in self.stands_for.items()}
                self.generators = [
                    (known.get(which, g), more.draws.counts[which])
                    for which, g in more.draws.generators.items()
                ]
        self.choice = chosen_for(self)
        for cell in self.made:  # these were made for a trace that is not used
            cell.array = None
        places = {id(c): i for i, c in enumerate(self.inputs)}
        for x in self.living():
            cell = None if x.grad is None else x.grad._cell  # type: ignore[attr-defined]
            if cell is not None and id(cell) in places:
                self.of_grads.append((places[id(cell)], weakref.ref(x)))
        self.jitted = jax.jit(functools.partial(self.run), **self.options)  # it checks seeds again
        self.pulled = jax.jit(functools.partial(self._with_pullback))
        self.ready = True

    def _with_pullback(self, arrays: Any, state: Any, words: Any, drawn: Any) -> Any:
        def of(arrays: Any, state: Any) -> Any:
            results, new_state, made = self.run(arrays, state, words, drawn)
            return results, (new_state, made)

        results, pull, (new_state, made) = jax.vjp(of, arrays, state, has_aux=True)
        return results, new_state, made, pull

    def check(self, tensors: Sequence[Tensor]) -> None:
        if self.argument_writes and len({id(x._cell) for x in tensors}) < len(tensors):
            raise Torch2JaxError(
                "a compiled function writes to an argument that shares its memory with another "
                "one: pass x.clone(), or close over the tensor."
            )
        for i, _ in self.argument_grads:
            if not tensors[i].is_leaf:
                raise Torch2JaxError(
                    "backward() in a compiled function reaches an argument that is a result of "
                    "other operations, whose graph it cannot follow: compute it in the function "
                    "too, or pass x.detach()."
                )

    def finish(self, tensors: Sequence[Tensor], new_state: Any, made: Any) -> None:
        for i, array in zip(self.written, new_state, strict=True):
            cell = self.inputs[i]
            cell.array, cell.recipe = array, None
            cell.version += 1
        made, new_grads, new_arguments = made
        for i, array in zip(self.argument_writes, new_arguments, strict=True):
            write(tensors[i], array)
            torch.autograd.graph.increment_version(tensors[i])
        for cell, array in zip(self.made, made, strict=True):
            cell.array = array
        grads = iter(new_grads)
        for i, dtype in self.argument_grads:
            add_gradient(tensors[i], wrap(next(grads), dtype))
        for ref, dtype in self.new_grads:
            new = None if dtype is None else wrap(next(grads), dtype)
            leaf = ref()
            if leaf is not None:
                leaf.grad = new


def _is_same(x: Any, y: Any) -> bool:
    """Compare generators by their address: PyTorch may wrap one in several objects."""
    return isinstance(y, torch.Generator) and x._cdata == y._cdata  # type: ignore[attr-defined]
