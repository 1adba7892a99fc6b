"""``device.jit``: a function of tensors as one compiled program, with what it closes over.

NOTE [What a compiled function closes over]. A PyTorch function reads and writes tensors that are
not among its arguments: a module's parameters, an optimizer's state. While it is traced, memory
(cells) from before the trace becomes an input when it is first read; what is written to becomes an
output, and so does memory that was made in the trace and outlives it. After each call the outputs
are put into their cells. The first call runs step by step, so that state that is made lazily (an
optimizer's) is there when the second one is traced.

NOTE [Gradients of leaves]. ``backward()`` in a compiled function makes a leaf's ``grad``, or adds
to one that is there. Which of the two is part of the program, so there is one for each pattern of
gradients that are there before the call; the memory of ``grad`` is looked up at each call, and a
new one is put into the leaf after it. A leaf among the arguments has none in the trace; what it
gets there is added after the call.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import torch
from jax.core import Tracer
from torch.utils import _pytree as torch_tree
from torch.utils._python_dispatch import TorchDispatchMode

from .._dtypes import dtype_j2t, x64_enabled
from .._errors import SignatureError, Torch2JaxError
from . import random
from .constants import value_of
from .registration import enable
from .state import lowering_scope
from .tensor import Cell, Tensor, captures, wrap, write

__all__ = ["JittedFunction", "JittedModule", "jit"]


class _Leaves:
    """The leaves, from before, that a function uses on this thread."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.started = Cell(None).serial
        self.leaves: dict[int, weakref.ref[Tensor]] = {}

    def born(self, cell: Cell) -> None:
        pass

    def read(self, x: Tensor) -> None:
        self.seen(x)

    def seen(self, x: Tensor) -> None:
        if x.is_leaf and x._cell.serial < self.started and threading.get_ident() == self.thread:
            self.leaves[id(x)] = weakref.ref(x)

    def living(self) -> list[Tensor]:
        found = (ref() for ref in self.leaves.values())
        return [x for x in found if x is not None and x.is_leaf]


class _Capture(_Leaves):
    """What one trace reads, writes and makes. Belongs to the thread that traces."""

    def __init__(self, inputs: Sequence[Cell]) -> None:
        super().__init__()
        self.known = set(map(id, inputs))
        self.found: dict[int, tuple[Cell, Any]] = {}
        """Cells from before the trace that were not known, with their arrays."""
        self.made: list[weakref.ref[Cell]] = []

    def born(self, cell: Cell) -> None:
        if threading.get_ident() == self.thread:
            self.made.append(weakref.ref(cell))

    def read(self, x: Tensor) -> None:
        self.seen(x)
        cell = x._cell
        if cell.serial > self.started or id(cell) in self.known or id(cell) in self.found:
            return
        if threading.get_ident() != self.thread or isinstance(cell.array, Tracer):
            return
        self.found[id(cell)] = (cell, cell.array)
        # A tracer, so that whatever depends on it is traced.
        cell.array = jax.lax.optimization_barrier(cell.array)

    def survivors(self) -> list[Cell]:
        cells = [ref() for ref in self.made]
        return [c for c in cells if c is not None and isinstance(c.array, Tracer)]


@contextlib.contextmanager
def _noting_leaves() -> Iterator[_Leaves]:
    capture = _Leaves()
    captures.append(capture)
    try:
        yield capture
    finally:
        captures.remove(capture)


@contextlib.contextmanager
def _capturing(inputs: Sequence[Cell]) -> Iterator[_Capture]:
    capture = _Capture(inputs)
    captures.append(capture)
    try:
        yield capture
    finally:
        captures.remove(capture)
        for cell, array in capture.found.values():
            cell.array = array


class _Watch(TorchDispatchMode):
    """Refuses writes to tensors of other devices from before the trace: they would happen once."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: set[int] = set()
        self.kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for argument, x in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._refuse(func, x if isinstance(x, list | tuple) else [x])
        out = func(*args, **kwargs)
        for x in torch_tree.tree_leaves(out):
            if type(x) is torch.Tensor:
                self.ours.add(id(x))
                self.kept.append(x)
        return out

    def _refuse(self, func: Any, written: Any) -> None:
        for x in written:
            if type(x) is torch.Tensor and id(x) not in self.ours:
                raise Torch2JaxError(
                    f"{func} writes to a tensor on {x.device} while a function is compiled for "
                    "device jax: that would happen once, not at each call. Keep such state on "
                    'the device: capturable=True for optimizers, tensor.to("jax") otherwise.'
                )


class _Plan:
    """A compiled function for arguments of one structure, and leaves with or without gradients."""

    def __init__(self, fn: Callable[..., Any], spec: Any, statics: Any, metas: Any, options: Any):
        self.fn, self.spec, self.statics, self.metas = fn, spec, statics, metas
        self.inputs: list[Cell] = []
        self.written: list[int] = []
        self.made: list[Cell] = []
        self.leaves: list[weakref.ref[Tensor]] = []
        self.of_grads: list[tuple[int, weakref.ref[Tensor]]] = []
        """Inputs that are the memory of a leaf's gradient."""
        self.new_grads: list[tuple[weakref.ref[Tensor], torch.dtype | None]] = []
        """Leaves whose gradient is another after the call; None: they have none."""
        self.argument_grads: list[tuple[int, torch.dtype]] = []
        self.argument_writes: list[int] = []
        self.others: dict[Any, _Plan] = {}
        self.out: Any = None
        self.grad = torch.is_grad_enabled()
        self.differentiable = False
        self.ran = False
        self.ready = False
        donate = (1,) if options.pop("donate_state", False) else ()
        self.options = {**options, "donate_argnums": donate} if donate else options

    # --- leaves and their gradients

    def note(self, leaves: Sequence[Tensor], arguments: Sequence[Tensor]) -> None:
        """Leaves that it closes over."""
        known = {id(x) for x in (*arguments, *self.living())}
        self.leaves += [weakref.ref(x) for x in leaves if id(x) not in known]

    def living(self) -> list[Tensor]:
        found = (ref() for ref in self.leaves)
        return [x for x in found if x is not None and x.requires_grad and x.is_leaf]

    def here(self) -> _Plan:
        """The plan for the leaves that have gradients now."""
        have = tuple((id(x), x.grad is not None) for x in self.living())
        plan = self.others.get(have)
        if plan is None:
            plan = self
            if self.others:
                plan = _Plan(self.fn, self.spec, self.statics, self.metas, dict(self.options))
                plan.grad, plan.differentiable = self.grad, self.differentiable
                plan.leaves = self.leaves
            self.others[have] = plan
        for i, ref in plan.of_grads:
            leaf = ref()
            if leaf is not None and leaf.grad is not None:
                plan.inputs[i] = leaf.grad._cell  # type: ignore[attr-defined]
        return plan

    # --- the traced function

    def run(self, arrays: Any, state: Any, words: Any) -> Any:
        """(results), (new state), (memory made in the trace, gradients, arguments written to)."""
        before = [c.array for c in self.inputs]
        versions = [c.version for c in self.inputs]
        tensors: list[Any] = [
            wrap(a, dtype).requires_grad_(needs and not self.differentiable)
            for a, (dtype, needs) in zip(arrays, self.metas, strict=True)
        ]
        leaves = list(self.statics)
        slots = iter(tensors)
        leaves = [next(slots) if x is _TENSOR else x for x in leaves]
        args, kwargs = torch_tree.tree_unflatten(leaves, self.spec)
        scope = lowering_scope() if self.differentiable else contextlib.nullcontext()
        grads = [(x, x.grad) for x in self.living()]
        try:
            for cell, array in zip(self.inputs, state, strict=True):
                cell.array = array
            with _capturing(self.inputs) as capture:
                # It may be traced inside a forward pass of autograd, where gradients are off.
                grad = torch.enable_grad if self.grad else torch.no_grad
                with random.drawing_from(words, words=True), scope, grad(), _Watch():
                    result = self.fn(*args, **kwargs)
                outs, self.out = _flatten_result(result)
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
        finally:
            for x, was in grads:
                x.grad = was
            for cell, array in zip(self.inputs, before, strict=True):
                cell.array = array
        if found:
            raise _MoreInputs(found)
        self.written, self.made = changed, made
        return results, new_state, (new_made, new_grads, new_arguments)

    def prepare(self, arrays: Any, words: Any) -> None:
        """Find out what it closes over: trace until nothing new is found."""
        while True:
            state = [c.array for c in self.inputs]
            try:
                jax.eval_shape(self.run, arrays, state, words)
                break
            except _MoreInputs as more:
                self.inputs += more.cells
        for cell in self.made:  # made for a trace that is not used
            cell.array = None
        places = {id(c): i for i, c in enumerate(self.inputs)}
        for x in self.living():
            cell = None if x.grad is None else x.grad._cell  # type: ignore[attr-defined]
            if cell is not None and id(cell) in places:
                self.of_grads.append((places[id(cell)], weakref.ref(x)))
        self.jitted = jax.jit(self.run, **self.options)
        self.pulled = jax.jit(self._with_pullback)
        self.ready = True

    def _with_pullback(self, arrays: Any, state: Any, words: Any) -> Any:
        def of(arrays: Any, state: Any) -> Any:
            results, new_state, made = self.run(arrays, state, words)
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
            _add_gradient(tensors[i], wrap(next(grads), dtype))
        for ref, dtype in self.new_grads:
            new = None if dtype is None else wrap(next(grads), dtype)
            leaf = ref()
            if leaf is not None:
                leaf.grad = new


def _add_gradient(x: Tensor, gradient: Tensor) -> None:
    with torch.no_grad():
        x.grad = gradient if x.grad is None else x.grad.add_(gradient)


class _MoreInputs(Exception):
    def __init__(self, cells: list[Cell]) -> None:
        self.cells = cells


_TENSOR = object()


def _flatten_result(result: Any) -> tuple[list[Tensor], Any]:
    leaves, spec = torch_tree.tree_flatten(result)
    outs = [x for x in leaves if isinstance(x, Tensor)]
    rest = [(_TENSOR, x.dtype) if isinstance(x, Tensor) else (None, x) for x in leaves]
    return outs, (spec, rest)


def _unflatten_result(out: Any, tensors: Sequence[Any]) -> Any:
    spec, rest = out
    made = iter(tensors)
    leaves = [next(made) if mark is _TENSOR else x for mark, x in rest]
    return torch_tree.tree_unflatten(leaves, spec)


_pull = jax.jit(lambda pull, cotangents: pull(cotangents))


class _Differentiable(torch.autograd.Function):
    """A compiled call whose derivative, compiled too, is JAX's."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, words: Any, inputs: Any, count: int, *tensors: Any) -> Any:  # type: ignore[override]
        arrays = [x._cell.array if x._chain is None else x.jax() for x in tensors[:count]]
        state = [c.array for c in plan.inputs]
        results, new_state, made, ctx.pull = plan.pulled(arrays, state, words)
        plan.finish(tensors[:count], new_state, made)
        ctx.needs = [id(x._cell) for x in tensors[count:]]
        ctx.order = [id(c) for c in plan.inputs]
        ctx.avals = [(r.shape, r.dtype) for r in results]
        ctx.count = count
        dtypes = [dtype for mark, dtype in plan.out[1] if mark is _TENSOR]
        outs = tuple(wrap(r, d) for r, d in zip(results, dtypes, strict=True))
        ctx.mark_non_differentiable(
            *[x for x in outs if not (x.is_floating_point() or x.is_complex())]
        )
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        cotangents = []
        for g, (shape, dtype) in zip(grads, ctx.avals, strict=True):
            if not jax.numpy.issubdtype(dtype, jax.numpy.inexact):
                cotangents.append(jax.numpy.zeros(shape, jax.dtypes.float0))
            elif g is None:
                cotangents.append(jax.numpy.zeros(shape, dtype))
            else:
                cotangents.append(jax.numpy.conj(g.jax()).astype(dtype))
        by_argument, by_state = _pull(ctx.pull, cotangents)
        found = list(by_argument) + [by_state[ctx.order.index(i)] for i in ctx.needs]
        return (None, None, None, None, *[_gradient(g) for g in found])


def _gradient(g: Any) -> Any:
    if g is None or g.dtype == jax.dtypes.float0:
        return None
    return wrap(jax.numpy.conj(g), dtype_j2t(g.dtype))


class JittedFunction:
    """A function of tensors on device jax as one compiled program; made by ``jit``."""

    def __init__(self, fn: Callable[..., Any], module: Any, options: dict[str, Any]) -> None:
        self.__wrapped__ = fn
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self._module, self._options = module, options
        self._plans: dict[Any, _Plan] = {}
        self._cells: list[Cell] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = torch_tree.tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        statics = [_TENSOR if isinstance(x, Tensor) else x for x in leaves]
        for x in statics:
            if isinstance(x, torch.Tensor):
                raise SignatureError(
                    f"{self.__name__} is compiled for device jax and got a tensor on {x.device}: "
                    'move it first, tensor.to("jax").'
                )
        metas = tuple((x.dtype, x.requires_grad) for x in tensors)
        modes: Any = ()
        if self._module is not None:
            modes = tuple(m.training for m in self._module.modules())
            cells = [x._cell for x in self._module.parameters() if isinstance(x, Tensor)]
            if cells != self._cells:  # other parameters than the plans know
                self._plans, self._cells = {}, cells
        marks = tuple(None if x is _TENSOR else (type(x), x) for x in statics)
        cast = torch.is_autocast_enabled("jax") and torch.get_autocast_dtype("jax")
        key = (spec, marks, metas, modes, cast, torch.is_grad_enabled(), x64_enabled())
        plan = self._plans.get(key)
        if plan is None:
            options = dict(self._options)
            plan = self._plans[key] = _Plan(self.__wrapped__, spec, statics, metas, options)
        if not plan.ran:
            with _noting_leaves() as seen:
                result = self.__wrapped__(*args, **kwargs)
            plan.note(seen.living(), tensors)
            plan.ran = True
            outs = [x for x in torch_tree.tree_leaves(result) if isinstance(x, torch.Tensor)]
            plan.differentiable = any(x.requires_grad for x in outs)
            return result
        arrays = [x._cell.array if x._chain is None else x.jax() for x in tensors]
        words = random.next_words()
        plan = plan.here()
        if not plan.ready:
            plan.prepare(arrays, words)
        plan.check(tensors)
        if plan.differentiable:
            places = set(map(id, plan.inputs))
            parameters = [x for x in plan.living() if id(x._cell) in places]
            outs = _Differentiable.apply(plan, words, None, len(tensors), *tensors, *parameters)
            return _unflatten_result(plan.out, outs)
        results, new_state, made = plan.jitted(arrays, [c.array for c in plan.inputs], words)
        plan.finish(tensors, new_state, made)
        dtypes = [dtype for mark, dtype in plan.out[1] if mark is _TENSOR]
        outs = [wrap(r, d) for r, d in zip(results, dtypes, strict=True)]
        return _unflatten_result(plan.out, outs)


def jit(fn: Any, **options: Any) -> Any:
    """A function of tensors on device "jax", or a module, as one compiled program.

    Args:
      fn: a function, a whole training step (forward, backward and update) or an ``nn.Module``.
        Its arguments are pytrees; tensors are operands, everything else selects a program. Tensors
        that it closes over, such as parameters, are inputs too, and may be written to; other
        Python state is read when it is traced. Optimizers need ``capturable=True`` where they have
        it.
      **options: of ``jax.jit``. ``donate_state=True`` donates what it closes over: parameters that
        a step updates are then updated in their memory.

    Returns:
      A function like ``fn``; for a module a module with the same parameters and the same
      ``state_dict``. Results have gradients where the original's have.

    Raises:
      Torch2JaxError: the function asks for a value (``.item()``), or writes to a tensor that is on
        another device.

    The first call runs step by step, the second one compiles.

    >>> import torch, torch2jax
    >>> torch2jax.device.enable()
    >>> f = torch2jax.device.jit(lambda x: torch.sin(x) * 2)
    >>> x = torch.zeros(2, device="jax")
    >>> f(x), f(x)
    (tensor([0., 0.], device='jax:0'), tensor([0., 0.], device='jax:0'))
    """
    enable()
    if isinstance(fn, torch.nn.Module):
        return JittedModule(fn, **options)
    if not callable(fn):
        raise SignatureError(f"device.jit takes a function or a module, got {type(fn).__name__}.")
    return JittedFunction(fn, None, options)


class JittedModule(torch.nn.Module):
    """A module whose forward pass is one compiled program; made by ``jit``."""

    def __init__(self, module: torch.nn.Module, **options: Any) -> None:
        super().__init__()
        # Not a submodule: names in state_dict are the original's.
        self._original: Any
        self._jitted: Any
        self.__dict__["_original"] = module
        self.__dict__["_jitted"] = JittedFunction(module, module, options)
        self._parameters = module._parameters
        self._buffers = module._buffers
        self._modules = module._modules
        self.training = module.training

    def train(self, mode: bool = True) -> JittedModule:
        self._original.train(mode)
        self.training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted(*args, **kwargs)

    def extra_repr(self) -> str:
        return "jitted"
