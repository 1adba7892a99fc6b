"""``device.jit`` makes a function of tensors, or a module, one compiled program."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jax.core import Tracer
from torch.utils import _pytree as torch_tree

from ..._conversions.dtypes import x64_enabled
from ..._errors import SignatureError, Torch2JaxWarning
from ..._progress import telling
from .. import random_streams
from ..setup.enable import enable
from ..tensors.tensor import Tensor, captures, wrap
from ..tracing.bridged_modules import Rehearsal, retried
from .captured import noting_leaves
from .compiled import CompiledCall
from .differentiable import Differentiable
from .results import TENSOR, unflatten_result
from .surroundings import Surroundings

__all__ = ["JittedFunction", "JittedModule", "jit"]


_LEAVES = frozenset({Tensor, int, float, bool, str, type(None)})


def _is_hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


class JittedFunction:
    """A jitted function runs a function of tensors as one compiled program; ``jit`` makes it."""

    def __init__(self, fn: Callable[..., Any], options: dict[str, Any]) -> None:
        self.__wrapped__ = fn
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self._options = options
        self._around = Surroundings(fn)
        self._first: dict[Any, set[Any]] = {}
        """What a first call set in its surroundings, by structure and dtypes of its arguments."""
        self._specs: dict[Any, Any] = {}

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
        """Flatten as PyTorch does, in a third of the time where no argument is a container."""
        leaves = [*args, *kwargs.values()]
        if not _LEAVES.issuperset(map(type, leaves)):
            return torch_tree.tree_flatten((args, kwargs))
        key = (len(args), *kwargs)
        spec = self._specs.get(key)
        if spec is None:
            spec = self._specs[key] = torch_tree.tree_flatten((args, kwargs))[1]
        return leaves, spec

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = self._flatten(args, kwargs)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        statics = [TENSOR if isinstance(x, Tensor) else x for x in leaves]
        for x in statics:
            if isinstance(x, torch.Tensor):
                raise SignatureError(
                    f"{self.__name__} is compiled for device jax and got a tensor on {x.device}: "
                    'move it first, tensor.to("jax").'
                )
        if captures or any(isinstance(x._cell.array, Tracer) for x in tensors):
            return self.__wrapped__(*args, **kwargs)  # it is a part of what is being traced
        metas = tuple((x.dtype, x.requires_grad, x.shape) for x in tensors)
        marks = tuple(None if x is TENSOR else _mark(x, statics) for x in statics)
        cast = torch.is_autocast_enabled("jax") and torch.get_autocast_dtype("jax")
        key = (spec, marks, metas, cast, torch.is_grad_enabled(), x64_enabled())
        calls = self._around.look().calls
        try:
            compiled = calls.get(key)
        except TypeError:
            kinds = ", ".join(sorted({type(x).__name__ for x in statics if not _is_hashable(x)}))
            raise SignatureError(
                f"{self.__name__} is compiled for device jax, and an argument that is no tensor "
                f"selects a program by its value, which a {kinds} cannot: make arrays tensors by "
                "device.tensor(array)."
            ) from None
        if compiled is None or (compiled.generation != self._around.generation and compiled.lost()):
            return self._run_first(key, calls, spec, statics, metas, tensors, args, kwargs)
        arrays = [x._cell.array if x._chain is None else x.jax() for x in tensors]
        compiled = compiled.here()
        if compiled.known and not compiled.known.hold(self._around.tensors):
            compiled.renew()
        if not compiled.ready:
            rehearsal = functools.partial(_rehearsal, compiled, arrays)
            with telling(f"tracing {self.__name__} for device jax"):
                retried(compiled, functools.partial(compiled.prepare, arrays), rehearsal)
        words = random_streams.next_words() if compiled.draws else random_streams.NO_WORDS
        drawn = compiled.words(leaves) if compiled.generators else []
        compiled.check(tensors)
        if compiled.differentiable:
            places = set(map(id, compiled.inputs))
            parameters = [x for x in compiled.living() if id(x._cell) in places]
            outs = Differentiable.apply(
                compiled, (words, drawn), len(tensors), *tensors, *parameters
            )
        else:
            state = [c.array for c in compiled.inputs]
            results, new_state, made = compiled.jitted(arrays, state, words, drawn)
            compiled.finish(tensors, new_state, made)
            outs = [wrap(r, d) for r, d in zip(results, compiled.dtypes, strict=True)]
        if compiled.changes or compiled.moves:
            compiled.set_surroundings(tensors, outs)
        return unflatten_result(compiled.out, outs)

    def _run_first(
        self, key: Any, calls: Any, spec: Any, statics: Any, metas: Any, tensors: Any, args: Any,
        kwargs: Any,
    ) -> Any:  # fmt: skip
        """Run step by step, so that lazy state is made. Note what compiling will need."""
        around = self._around
        compiled = CompiledCall(self.__wrapped__, spec, statics, metas, dict(self._options), around)
        saved = around.save()
        with noting_leaves() as seen:
            result = self.__wrapped__(*args, **kwargs)
        leaves = seen.living()
        compiled.note(leaves, tensors)
        compiled.ran = True
        changes = around.changes(saved)
        outs = torch_tree.tree_leaves(result)
        ours = [x for x in outs if isinstance(x, Tensor)]
        compiled.detached = frozenset(i for i, x in enumerate(ours) if not x.requires_grad)
        if not any(x.grad is not None for x in leaves):  # the call had no backward pass
            outs += torch_tree.tree_leaves([c.new for c in changes])
        outs = [x for x in outs if isinstance(x, torch.Tensor)]
        compiled.differentiable = any(x.grad_fn is not None for x in outs)
        calls[key] = compiled
        again = around.numbers_set(changes)
        kind = (spec, tuple(str(m[0]) for m in metas))
        self._note_volatile(again & self._first.get(kind, set()))
        self._first[kind] = again
        after = around.look().calls
        if after is not calls and key not in after:
            after[key] = compiled.copy()
        return result

    def _note_volatile(self, items: set[Any]) -> None:
        """Note items that two calls have set, because each value would select another program."""
        new = items - self._around.volatile
        if new:
            self._around.volatile |= new
            names = ", ".join(sorted({"a list" if k is None else str(k) for _, k in new}))
            warnings.warn(
                f"{self.__name__}, which is compiled for device jax, changes Python values at each "
                f"call ({names}). They are no part of the program, which keeps their values from "
                "the trace: make them tensors on device jax.",
                Torch2JaxWarning,
                stacklevel=4,
            )


def _rehearsal(compiled: CompiledCall, arrays: Any) -> Rehearsal:
    """Return a run on these arrays and on the state as it is, which changes nothing."""
    state = [c.array for c in compiled.inputs]
    drawn = [np.zeros((count, 2), np.uint32) for _, count in compiled.generators]
    run = functools.partial(compiled.run, arrays, state, random_streams.NO_WORDS, drawn)
    return Rehearsal(run, trusted=False)


def _mark(x: Any, statics: Any) -> Any:
    if isinstance(x, _Generator):
        return "generator", [getattr(y, "_cdata", None) for y in statics].index(x._cdata)
    return type(x), x


_Generator: Any = torch._C.Generator


def jit(fn: Any, **options: Any) -> Any:
    """Make a function of tensors on device "jax", or a module, one compiled program.

    Args:
      fn: a function, a whole training step (forward, backward and update) or an ``nn.Module``.
        Its arguments are pytrees: tensors are operands, and everything else selects a program.
        Tensors that it closes over, such as parameters, are inputs too; it may write to them and
        replace them. Flags, numbers, hooks and other Python state that it can reach select a
        program, and are looked at before each call. Generators go on as in eager mode. Optimizers
        need ``capturable=True`` where they have it.
      **options: options of ``jax.jit``. ``donate_state=True`` donates what the function closes
        over, so that a step updates parameters in their memory.

    Returns:
      A function like ``fn``. For a module it is a module with the same parameters and the same
      ``state_dict``. Results have gradients where the original's have.

    Raises:
      Torch2JaxError: the function asks for a value (``.item()``) and no module in it can do that
        through the bridge, it writes to a tensor that is on another device, or draws random numbers
        there.

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
    return JittedFunction(fn, options)


class JittedModule(torch.nn.Module):
    """A jitted module runs its forward pass as one compiled program; ``jit`` makes it."""

    def __init__(self, module: torch.nn.Module, **options: Any) -> None:
        super().__init__()
        # The original is no submodule, so that names in state_dict are the original's.
        self._original: Any
        self._jitted: Any
        self.__dict__["_original"] = module
        self.__dict__["_jitted"] = JittedFunction(module, options)
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
