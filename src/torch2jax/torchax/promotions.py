"""An environment accepts what torchax accepts and PyTorch refuses: mixed dtypes and devices."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from .._conversions.float64 import WIDE_FLOATS, is_carried
from .._conversions.narrowed import NARROWED
from ..device.tensors.tensor import Tensor
from .config import Configuration

__all__ = ["narrowed", "on_jax", "promoted"]

_T = torch.Tensor
_INDICES = dict.fromkeys((torch.take_along_dim, _T.take_along_dim), 1) | {F.one_hot: 0}
"""Functions that take int64 indices alone, with the position of the indices."""
_PRODUCTS = frozenset(
    {
        *(torch.matmul, _T.matmul, _T.__matmul__, _T.__rmatmul__, torch.mm, _T.mm),
        *(torch.bmm, _T.bmm, torch.mv, _T.mv, torch.dot, _T.dot, torch.inner, _T.inner),
        *(torch.addmm, _T.addmm, torch.baddbmm, _T.baddbmm, torch.tensordot, torch.einsum),
        *(F.linear, F.bilinear, F.scaled_dot_product_attention),
        *(F.conv1d, F.conv2d, F.conv3d),
    }
)
"""Functions whose floating-point operands PyTorch wants to be of one dtype."""


def promoted(func: Any, args: Any, kwargs: Any, config: Configuration) -> tuple[Any, Any]:
    """Return the arguments as PyTorch takes them.

    Indices of int32 become int64, and operands of a product get their common dtype. Beside tensors
    on device jax a CPU tensor of one element stands for its number.
    """
    at = _INDICES.get(func)
    if at is not None and len(args) > at:
        index = args[at]
        if isinstance(index, _T) and not (index.is_floating_point() or index.dtype is torch.bool):
            args = (*args[:at], index.long(), *args[at + 1 :])
    elif func in _PRODUCTS:
        args, kwargs = _of_one_dtype(args, kwargs)
    if config.allow_mixed_math_with_scalar_tensor and _is_mixed(args):
        args = tuple([x.reshape(()) if _is_number(x) else x for x in args])
    return args, kwargs


def _of_one_dtype(args: Any, kwargs: Any) -> tuple[Any, Any]:
    dtypes = {x.dtype for x in (*args, *kwargs.values()) if _is_floating(x)}
    if len(dtypes) < 2:
        return args, kwargs
    dtype = functools.reduce(torch.promote_types, dtypes)
    args = tuple([x.to(dtype) if _is_floating(x) else x for x in args])
    return args, {k: x.to(dtype) if _is_floating(x) else x for k, x in kwargs.items()}


def _is_floating(x: Any) -> bool:
    return isinstance(x, _T) and x.is_floating_point()


def _is_mixed(args: Any) -> bool:
    ours = others = False
    for x in args:
        if isinstance(x, _T):
            ours, others = (True, others) if isinstance(x, Tensor) else (ours, True)
    return ours and others


def _is_number(x: Any) -> bool:
    return isinstance(x, _T) and not isinstance(x, Tensor) and x.numel() == 1 and x.ndim > 0


def on_jax(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """Return a function and its arguments with device jax in the place of "cuda"."""
    if func is _T.cuda:
        return _T.to, (args[0], "jax"), {}
    if _is_cuda(kwargs.get("device")):
        kwargs = {**kwargs, "device": "jax"}
    if func is _T.to and any(map(_is_cuda, args[1:])):
        args = tuple(["jax" if _is_cuda(x) else x for x in args])
    return func, args, kwargs


def _is_cuda(x: Any) -> bool:
    if isinstance(x, torch.device):
        return x.type == "cuda"
    return isinstance(x, str) and x.partition(":")[0] == "cuda"


def narrowed(out: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of a function, in which a new tensor of float64 is one of float32.

    So it is while x64 is off, and complex128 is complex64: in torchax a tensor has the dtype of its
    array. Where an operand is of float64, because it was made outside of the environment, a result
    may be that operand or share its memory, and stays as it is.
    """
    if isinstance(out, Tensor):
        dtype = out.dtype
        if dtype not in WIDE_FLOATS or not is_carried(dtype) or _wide(args, kwargs):
            return out
        if out.requires_grad and out.is_leaf:
            return out.detach().to(NARROWED[dtype]).requires_grad_()
        return out.to(NARROWED[dtype])
    if type(out) in (tuple, list) and any(isinstance(x, Tensor) for x in out):
        return type(out)(narrowed(x, args, kwargs) for x in out)
    return out


def _wide(args: Any, kwargs: Any) -> bool:
    operands = (*args, *kwargs.values())
    return any(isinstance(x, Tensor) and x.dtype in WIDE_FLOATS for x in operands)
