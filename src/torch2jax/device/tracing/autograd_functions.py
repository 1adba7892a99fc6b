"""The backward pass of a ``torch.autograd.Function`` becomes JAX's derivative in a trace.

Under ``lower=True`` JAX differentiates what the forward pass did, operator by operator. A function
with a derivative of its own (a straight-through estimator) must keep that; see
``written_derivatives``. Its backward pass runs the forward pass again under PyTorch's autograd, on
tracers, and then PyTorch's backward pass.

NOTE [Callables among the arguments]. A callable may close over tensors. Those that are arguments,
too, get derivatives as such: PyTorch knows them by identity. So the runs are made on the arguments'
own objects, which hold the arrays of the run for that time. All others are constants to PyTorch's
derivative, and so they are to JAX's. JAX takes no closed-over tracers, so they become operands
without a derivative. Where there are such tensors, the backward pass is traced beside the forward
pass, as long as they are there.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import jax
import torch
from jax.core import Tracer
from torch.autograd import forward_ad
from torch.utils import _pytree as torch_tree
from torch.utils.checkpoint import CheckpointFunction

from ..._compat.jax import varying_together
from ..._errors import DifferentiationError
from .. import random_streams
from ..operators.constants import value_of
from ..setup.changes_of_pytorch import replace_while_tracing, replacing
from ..tensors.tensor import Cell, Tensor, become, recorded, wrap, write
from ..thread_state import derivatives_kept, state
from .closed_over import converted
from .written_derivatives import Written, with_derivative

__all__ = ["differentiable_by_jax"]


DEPTH = 2
"""How deep backward passes are traced beside their forward pass: a backward pass may call its own
function, and so on. A second derivative of a function in the callable of another one needs two."""


class _Active(threading.local):
    depth = 0
    backwards = 0
    """How many backward passes are being traced beside their forward pass."""
    grad = True
    """Whether gradients were on when ``setup_context`` was looked up last."""


_active = _Active()


@contextlib.contextmanager
def differentiable_by_jax() -> Iterator[None]:
    """In this scope autograd functions have their derivative for JAX, on this thread.

    However ``apply`` is reached, by its name or kept from earlier, PyTorch's code in C++ looks for
    ``setup_context`` in the class, then for ``forward``. During a trace it finds ours.
    """
    _active.depth += 1
    try:
        with replacing():
            yield
    finally:
        _active.depth -= 1


def _look_up(cls: Any, name: str) -> Any:
    """Stand for ``getattr(cls, name)`` of the classes of autograd functions."""
    found = type.__getattribute__(cls, name)
    if _active.depth:
        if name == "setup_context":
            _active.grad = torch.is_grad_enabled()
        elif name == "forward" and "of_jax" not in type.__getattribute__(cls, "__dict__"):
            # PyTorch asks for its signature, too.
            return functools.wraps(found)(functools.partial(_forward, cls, found, _active.grad))
    return found


def _checkpointed(cls: Any, run_function: Any, preserve_rng_state: Any, *args: Any) -> Any:
    """Run a checkpointed function as it is: JAX decides what to keep for its derivative."""
    if _active.depth:
        return run_function(*args)
    function: Any = super(CheckpointFunction, cls)
    return function.apply(run_function, preserve_rng_state, *args)


def _forward(cls: Any, forward: Any, grad: bool, *args: Any) -> Any:
    """Return what ``forward(*args)`` does, with the derivative of ``cls`` for JAX.

    ``grad`` says whether gradients were on when ``apply`` was called, which switches them off.

    The first argument is the context, unless the class has a ``setup_context`` of its own.
    """
    separate = cls.setup_context is not torch.autograd.Function.setup_context
    if not (_active.depth and (separate or (args and type(args[0]) is cls._backward_cls))):
        return forward(*args)  # the class calls it itself, or another class does
    inputs = args if separate else args[1:]
    leaves, spec = torch_tree.tree_flatten(tuple(inputs))
    places = [
        i for i, x in enumerate(leaves) if type(x) is Tensor and isinstance(x._cell.array, Tracer)
    ]
    if not any(leaves[i].is_floating_point() or leaves[i].is_complex() for i in places):
        return forward(*args)
    function = _Differentiated(cls, leaves, spec, places)
    given = [leaves[i] for i in places]
    if not (function.has_jvp or any(map(recorded, given))):
        out = function.outputs(_results(function, given, grad), given)
        if function.written and not separate:
            args[0].mark_dirty(*[given[i] for i in function.written.values()])
        return out
    # PyTorch's autograd may be at work. Its graph and context get values with JAX's derivative.
    outs, out_spec = torch_tree.tree_flatten(forward(*args))
    after = function.stream.count if function.stream is not None else 0
    cells = {id(x._cell) for x in given}
    results = iter(_results(function, given, grad))
    made = -1
    for place, x in enumerate(outs):
        if not isinstance(x, Tensor):
            continue
        made, result = made + 1, next(results)
        if any(x is y for y in given):
            if made in function.written:
                write(x, result)
            else:
                outs[place] = wrap(result, x.dtype)
        elif id(x._cell) in cells:
            become(x, wrap(result, x.dtype))
        else:
            write(x, result)
    if function.stream is not None:
        function.stream.count = after
    return torch_tree.tree_unflatten(outs, out_spec)


def _results(function: _Differentiated, given: list[Tensor], grad: bool) -> list[Any]:
    with torch.set_grad_enabled(grad):
        return function.results(given)


def _saves_result(outs: list[Tensor]) -> bool:
    """Say whether the context of a function's outputs has one of them."""
    cells = {id(x._cell) for x in outs}
    for node in {x.grad_fn for x in outs} - {None}:
        kept: Any = [getattr(node, name, ()) for name in ("saved_tensors", "__dict__")]
        if any(type(x) is Tensor and id(x._cell) in cells for x in torch_tree.tree_leaves(kept)):
            return True
    return False


class _Differentiated:
    """One call of a user's function is ``call(*arrays)``, with its own derivative for JAX."""

    def __init__(self, cls: Any, leaves: list[Any], spec: Any, places: list[int]) -> None:
        self.cls, self.spec, self.places = cls, spec, places
        # It keeps no tensor of the trace, because JAX keeps this object as long as the program.
        self.leaves = [None if i in places else x for i, x in enumerate(leaves)]
        self.dtypes = [leaves[i].dtype for i in places]
        self.stream = random_streams.current()
        self.start = self.stream.count if self.stream is not None else 0
        self.resume = state.resume
        self.outs: list[Any] = []
        """The outputs, with a mark and the dtype in the place of each tensor."""
        self.out_spec: Any = None
        self.written: dict[int, int] = {}
        """Which input an output is (``mark_dirty``), by their places among the tensors."""
        self._users = cls.__module__.partition(".")[0] != __name__.partition(".")[0]
        self._has_callables = any(map(callable, self.leaves))
        self.has_jvp = cls.jvp is not torch.autograd.Function.jvp
        self.objects: list[Tensor | None] = [None] * len(places)
        """The arguments' own tensors, while a run may use them."""

    def results(self, given: list[Tensor]) -> list[Any]:
        """Return the arrays of the function's outputs, which have its derivative for JAX."""
        # A gradient varies over the mesh axes of all operands, and so its operand has to.
        arrays = varying_together(map(value_of, given))
        self.objects = [x if x.is_leaf else None for x in given]
        try:
            call, held, outs = converted(self._call, *arrays)
            backward, kept = self._backward, []
            if self._users and (held or self._has_callables):
                if _active.backwards < DEPTH:
                    backward, kept = self._traced_backward(arrays, outs)
                elif held:  # its tensors will have gone
                    backward = self._too_deep
        finally:
            # No tensor of the trace is kept, because JAX keeps this object with the program.
            self.objects = [None] * len(given)
        n, m = len(arrays), len(arrays) + len(held)

        def function(*operands: Any) -> list[Any]:
            return call(*operands[:m])

        def backwards(operands: Any, cotangents: Any) -> Any:
            found = backward(operands[:n], cotangents, *operands[m:])
            return (*found, *[None] * (len(operands) - n))

        def forwards(operands: Any, tangents: Any) -> Any:
            return self._pushed(operands[:n], tangents[:n])

        written = Written(self.cls.__qualname__, backwards)
        if self.has_jvp and not (held or self._has_callables):  # its tensors will have gone
            written = written._replace(forwards=forwards)
        return with_derivative(function, written)(*arrays, *held, *kept)

    def _too_deep(self, *_: Any) -> Any:
        raise DifferentiationError(
            f"a derivative of order {DEPTH + 1} of {self.cls.__qualname__}, which closes over "
            "tensors in a callable among its arguments. Make these tensors arguments of "
            "operators alone, or take the derivative without lower=True."
        )

    def _traced_backward(self, arrays: Any, outs: Any) -> tuple[Any, Any]:
        """Trace the backward pass; return it and the tensors that it uses beside its arguments."""
        floats = [jax.numpy.issubdtype(x.dtype, jax.numpy.inexact) for x in outs]
        like = [
            jax.numpy.zeros(x.shape, x.dtype)
            for x, is_float in zip(outs, floats, strict=True)
            if is_float
        ]

        def full(chosen: Any) -> list[Any]:
            left = iter(chosen)
            return [next(left) if is_float else None for is_float in floats]

        _active.backwards += 1
        try:
            back, kept, _ = converted(lambda a, c: self._backward(a, full(c)), arrays, like)
        except Exception as error:
            raised = _without_frames(error)  # of a derivative that may not be asked for

            def refuse(*_: Any) -> Any:
                raise raised

            return refuse, []
        finally:
            _active.backwards -= 1

        def backward(arrays: Any, cotangents: Any, *kept: Any) -> Any:
            chosen = [c for c, is_float in zip(cotangents, floats, strict=True) if is_float]
            return back(*arrays, *chosen, *kept)

        return backward, kept

    def _call(self, *arrays: Any) -> list[Any]:
        # A transposed backward pass of another function has this one's forward pass in it.
        with self._inputs(arrays) as inputs, derivatives_kept():
            return [value_of(x) for x in self._run(inputs, False)]

    @contextlib.contextmanager
    def _inputs(self, arrays: Any) -> Iterator[list[Tensor]]:
        """Give tensors that hold the arrays: the arguments' own objects, where there are some."""
        inputs = [
            wrap(a, d) if x is None else x
            for a, d, x in zip(arrays, self.dtypes, self.objects, strict=True)
        ]
        own = [x for x in self.objects if x is not None]
        before = [(x, x._cell, x._chain, x._memo, recorded(x)) for x in own]
        try:
            for x, a, mine in zip(inputs, arrays, self.objects, strict=True):
                if mine is not None:
                    x._cell, x._chain, x._memo = Cell(a), None, None
                    x.requires_grad_(False)
            yield inputs
        finally:
            for x, cell, chain, memo, was_recorded in before:
                x._cell, x._chain, x._memo = cell, chain, memo
                x.requires_grad_(was_recorded)

    def _run(
        self, tensors: list[Tensor], requires_grad: bool, differentiable: bool = False
    ) -> list[Tensor]:
        """Return the outputs of the function on these inputs.

        With ``differentiable`` they have the function's derivative for JAX, too.
        """
        with self.resume():
            given = tensors
            if requires_grad:
                for t in tensors:
                    t.requires_grad_(t.is_floating_point() or t.is_complex())
                if self.written:  # a leaf may not be written to
                    given = [t.clone() for t in tensors]
            full = list(self.leaves)
            for i, t in zip(self.places, given, strict=True):
                full[i] = t
            a = torch_tree.tree_unflatten(full, self.spec)
            if self.stream is not None:
                self.stream.count = self.start  # every run draws the same
            depth, _active.depth = _active.depth, _active.depth if differentiable else 0
            try:
                out = self.cls.apply(*a)
            finally:
                _active.depth = depth
            outs, out_spec = torch_tree.tree_flatten(out)
            made = [x for x in outs if isinstance(x, Tensor)]
            if not requires_grad:
                self.outs = [(_TENSOR, x.dtype) if isinstance(x, Tensor) else x for x in outs]
                self.out_spec = out_spec
                self.written = {
                    j: i for j, x in enumerate(made) for i, t in enumerate(given) if x is t
                }
        return made

    def _backward(self, arrays: Any, cotangents: Any) -> Any:
        with self.resume(), self._inputs(arrays) as inputs:
            state.backward_passes += 1
            try:
                return self._gradients(inputs, arrays, cotangents)
            finally:
                state.backward_passes -= 1

    def _gradients(self, inputs: list[Tensor], arrays: Any, cotangents: Any) -> Any:
        outs = self._run(inputs, True)
        if _saves_result(outs):
            # A second derivative goes through what the backward pass has of the result.
            outs = self._run(inputs, True, differentiable=True)
        pairs = [
            (x, wrap(ct, x.dtype)) for x, ct in zip(outs, cotangents, strict=True) if recorded(x)
        ]
        wanted = [x for x in inputs if recorded(x)]
        found: list[Any] = [None] * len(wanted)
        if pairs and wanted:
            found = list(
                torch.autograd.grad(
                    [x for x, _ in pairs],
                    wanted,
                    [ct.conj() for _, ct in pairs],
                    create_graph=True,
                    allow_unused=True,
                )
            )
        gradients = []
        for x, a in zip(inputs, arrays, strict=True):
            if not recorded(x):
                gradients.append(None)
                continue
            g = found.pop(0)
            # PyTorch's gradients of complex values are the conjugates of JAX's.
            gradients.append(
                jax.numpy.zeros_like(a)
                if g is None
                else jax.numpy.conj(value_of(g)).astype(a.dtype)
            )
        return tuple(gradients)

    def _pushed(self, arrays: Any, tangents: Any) -> list[Any]:
        """Return the tangents of the float results, by the function's own ``jvp``."""
        with self.resume(), self._inputs(arrays) as inputs, forward_ad.dual_level():
            duals: list[Any] = [
                x if t is None else forward_ad.make_dual(x, wrap(t, x.dtype))
                for x, t in zip(inputs, tangents, strict=True)
            ]
            # What the jvp has of a result has the function's derivative, too.
            outs = self._run(duals, True, differentiable=True)
            pushed: list[Any] = [
                forward_ad.unpack_dual(x).tangent
                for x in outs
                if x.is_floating_point() or x.is_complex()
            ]
            return [None if t is None else value_of(t) for t in pushed]

    def outputs(self, results: list[Any], given: list[Tensor]) -> Any:
        """Return what the call returns; an input that was written to is returned itself."""
        found: list[Any] = []
        numbered = enumerate(results)
        for x in self.outs:
            if type(x) is not tuple or x[0] is not _TENSOR:
                found.append(x)
                continue
            j, result = next(numbered)
            if j in self.written:
                found.append(given[self.written[j]])
                write(found[-1], result)
            else:
                found.append(wrap(result, x[1]))
        return torch_tree.tree_unflatten(found, self.out_spec)


def _without_frames(error: Exception) -> Exception:
    """Take the frames, which keep tensors of a trace, from an error and those that it came from."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


_TENSOR = object()


replace_while_tracing(torch.autograd.function.FunctionMeta, "__getattribute__", _look_up)
replace_while_tracing(CheckpointFunction, "apply", classmethod(_checkpointed))
