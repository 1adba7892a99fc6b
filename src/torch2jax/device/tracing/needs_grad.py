"""A function that is traced for JAX's derivative asks ``x.requires_grad``.

PyTorch's autograd does not record there, so the attribute would be False. The function must take
the way that it takes where a derivative is wanted: the answer is True for what JAX differentiates.
That is every tensor of floating-point numbers that is traced, except where the derivative has been
ended: by ``detach``, or because gradients were off where it was computed. Another exception is what
``device.jit`` closes over: a parameter or buffer says for itself whether it requires a gradient, so
one that is frozen stays so. PyTorch's own code, which asks in order to record, gets PyTorch's
answer. A tensor of which it was said is a leaf of PyTorch's
graph from then on, so that ``torch.autograd.grad`` takes it. What was computed from it before is
not in the graph. So under ``lower=True`` ``torch.autograd.grad`` raises there what it raises of a
tensor that requires no gradient, and the function is traced again with operands that are leaves
from the start. Where nothing traces again (a backward pass that JAX runs later,
``device.value_and_grad``), the graph has what was computed since the question.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from jax.core import Tracer
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from ..tensors.tensor import Tensor, captures

__all__ = ["NeedsGrad"]


class NeedsGrad(TorchFunctionMode):
    """In this mode ``requires_grad`` of a traced tensor says whether JAX differentiates it.

    With ``refuse_late`` gradients by a tensor that has become a leaf by a question are refused.
    """

    def __init__(self, refuse_late: bool) -> None:
        super().__init__()
        self._refuse_late = refuse_late

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._refuse_late and func is torch.autograd.grad:
            _refuse_late(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if out is False and func == _GET:
            root = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
            if root not in _NOT_THE_USERS and _is_differentiated(args[0]):
                if not any(c.is_older(args[0]._cell) for c in captures):  # that is the user's
                    args[0].requires_grad_()
                    args[0]._late = True
                return True
        return out


_NOT_THE_USERS = ("torch", __name__.partition(".")[0])
_GET: Any = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]


def _refuse_late(outputs: Any, inputs: Any, *_: Any, **__: Any) -> None:
    if any(type(x) is Tensor and x._late for x in (inputs if _is_several(inputs) else [inputs])):
        raise RuntimeError(
            "a tensor that a gradient is asked for does not require grad where it was used first"
        )


def _is_several(inputs: Any) -> bool:
    return not isinstance(inputs, torch.Tensor | GradientEdge)


def _is_differentiated(x: Any) -> bool:
    if type(x) is not Tensor or x._cut or not isinstance(x._cell.array, Tracer):
        return False
    if any(c.is_as_before(x._cell) for c in captures):
        return False
    ended = x._chain is not None and x._chain.stops
    return not ended and (x.dtype.is_floating_point or x.dtype.is_complex)
