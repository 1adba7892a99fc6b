"""``device.jit``: a function of tensors, or a module, as one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as torch_tree

from ..._conversions.dtypes import x64_enabled
from ..._errors import SignatureError
from .. import random_streams
from ..setup.enable import enable
from ..tensors.tensor import Cell, Tensor, wrap
from .captured import noting_leaves
from .compiled import TENSOR, CompiledCall, Differentiable, unflatten_result

__all__ = ["JittedFunction", "JittedModule", "jit"]


_LEAVES = frozenset({Tensor, int, float, bool, str, type(None)})


def _is_hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


class JittedFunction:
    """A function of tensors on device jax as one compiled program; made by ``jit``."""

    def __init__(self, fn: Callable[..., Any], module: Any, options: dict[str, Any]) -> None:
        self.__wrapped__ = fn
        self.__name__ = getattr(fn, "__name__", type(fn).__name__)
        self._module, self._options = module, options
        self._compiled: dict[Any, CompiledCall] = {}
        self._cells: list[Cell] = []
        self._specs: dict[Any, Any] = {}

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
        """As PyTorch's; of arguments without containers at a third of the time."""
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
        metas = tuple((x.dtype, x.requires_grad) for x in tensors)
        modes: Any = ()
        if self._module is not None:
            modes = tuple(m.training for m in self._module.modules())
            cells = [x._cell for x in self._module.parameters() if isinstance(x, Tensor)]
            if cells != self._cells:  # other parameters than the compiled calls know
                self._compiled, self._cells = {}, cells
        marks = tuple(None if x is TENSOR else (type(x), x) for x in statics)
        cast = torch.is_autocast_enabled("jax") and torch.get_autocast_dtype("jax")
        key = (spec, marks, metas, modes, cast, torch.is_grad_enabled(), x64_enabled())
        try:
            compiled = self._compiled.get(key)
        except TypeError:
            kinds = ", ".join(sorted({type(x).__name__ for x in statics if not _is_hashable(x)}))
            raise SignatureError(
                f"{self.__name__} is compiled for device jax, and an argument that is no tensor "
                f"selects a program by its value, which a {kinds} cannot: make arrays tensors by "
                "device.tensor(array)."
            ) from None
        if compiled is None:
            options = dict(self._options)
            compiled = self._compiled[key] = CompiledCall(
                self.__wrapped__, spec, statics, metas, options
            )
        if not compiled.ran:
            with noting_leaves() as seen:
                result = self.__wrapped__(*args, **kwargs)
            compiled.note(seen.living(), tensors)
            compiled.ran = True
            outs = [x for x in torch_tree.tree_leaves(result) if isinstance(x, torch.Tensor)]
            compiled.differentiable = any(x.requires_grad for x in outs)
            return result
        arrays = [x._cell.array if x._chain is None else x.jax() for x in tensors]
        compiled = compiled.here()
        if not compiled.ready:
            compiled.prepare(arrays)
        words = random_streams.next_words() if compiled.draws else random_streams.NO_WORDS
        compiled.check(tensors)
        if compiled.differentiable:
            places = set(map(id, compiled.inputs))
            parameters = [x for x in compiled.living() if id(x._cell) in places]
            outs = Differentiable.apply(compiled, words, len(tensors), *tensors, *parameters)
            return unflatten_result(compiled.out, outs)
        results, new_state, made = compiled.jitted(
            arrays, [c.array for c in compiled.inputs], words
        )
        compiled.finish(tensors, new_state, made)
        dtypes = [dtype for mark, dtype in compiled.out[1] if mark is TENSOR]
        outs = [wrap(r, d) for r, d in zip(results, dtypes, strict=True)]
        return unflatten_result(compiled.out, outs)


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
