"""Small constants of a trace are computed by PyTorch on the CPU.

A model computes masks, positions and index tables of nothing that is traced. To compile a program
for each operator of these takes 20 ms, and PyTorch's own kernel some 20 µs.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from torch.utils import _pytree as torch_tree
from torch.utils._python_dispatch import _disable_current_modes

from ..._compat.jax import ArrayImpl
from ..._compat.torch import eager
from ..._conversions.convert import j2t
from ..._errors import UnsupportedDtypeError
from ...lowerings.views import OTHER_VALUES
from ..tensors.tensor import Tensor, from_torch
from .operands import fill

__all__ = ["compute", "fits"]

MOST = 1024
"""The elements of a small operand."""


def fits(program: Any) -> bool:
    """Say whether PyTorch has a kernel that does what the program does."""
    route = program.route
    if route.mutable or route.random or route.lowered.replaced or program.carries:
        return False
    func = route.func
    dispatched = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = "CPU", "CompositeExplicitAutograd"
    return func.namespace in ("aten", "prims") and any(dispatched(func.name(), key) for key in keys)


def compute(program: Any, operands: list[Any]) -> tuple[Any] | None:
    """Return the arrays of the results in a tuple, or None where the program has to run.

    Where PyTorch refuses operands, the program says so in its own way.
    """
    try:
        values = _values(operands)
        return None if values is None else (_computed(program, values),)
    except (RuntimeError, IndexError, TypeError, ValueError, UnsupportedDtypeError):
        return None


def _values(operands: list[Any]) -> list[Any] | None:
    if not eager() or torch.is_autocast_enabled("cpu"):
        return None
    found = []
    for x in operands:
        if type(x) is Tensor:
            x = _host(x)
            if x is None:
                return None
        found.append(x)
    return found


def _computed(program: Any, values: list[Any]) -> Any:
    args = [fill(a, values) for a in program.args]
    kwargs = {k: fill(v, values) for k, v in program.kwargs.items()}
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    with torch.no_grad(), _disable_current_modes():
        out = program.route.func(*args, **kwargs)
        arrays = torch_tree.tree_map(lambda x: x if x is None else from_torch(x), out)
        program.torch_dtypes = [x.dtype for x in torch_tree.tree_leaves(out) if x is not None]
        return arrays


def _host(t: Tensor) -> torch.Tensor | None:
    array = t._cell.array
    if type(array) is not ArrayImpl or array.size > MOST or t.numel() > MOST:
        return None
    if not array.is_fully_addressable or jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
        return None
    x = j2t(np.asarray(array))
    for step in () if t._chain is None else t._chain.steps:
        if step.op in OTHER_VALUES or step.op is torch.ops.aten.view.dtype:
            return None
        x = step.op(x, *step.args)
        x = x if step.index is None else x[step.index]
    return x.to(t.dtype)
