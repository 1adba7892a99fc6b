"""PyTorch's kernels for meta tensors say what an operator returns for shapes, and what it refuses.

JAX broadcasts, clips and wraps where PyTorch raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jax.core import Tracer
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["Unknown", "results_for"]


class Unknown(Exception):
    """PyTorch has no kernel for meta tensors here."""


def results_for(
    func: Any,
    values: Sequence[Any],
    dtypes: Sequence[torch.dtype | None],
    arguments: Callable[[Sequence[Any]], tuple[list[Any], dict[str, Any]]],
) -> Any:
    """Return what an operator returns for meta tensors.

    Args:
      func: the operator.
      values: its operands: arrays, and numbers, which may be tracers.
      dtypes: PyTorch's dtypes of the operands, None for numbers.
      arguments: makes the operator's arguments of operands.

    Raises:
      Unknown: there is no such kernel, or it asks for values.
      Exception: PyTorch's own error, where it refuses such operands.
    """
    metas: list[Any] = []
    for v, d in zip(values, dtypes, strict=True):
        if d is None:
            # Any number of the same type will do.
            metas.append(v.dtype.type(1).item() if isinstance(v, Tracer) else v)
        elif all(type(n) is int for n in v.shape):
            metas.append(torch.empty(v.shape, dtype=d, device="meta"))
        else:
            raise Unknown
    args, kwargs = arguments(metas)
    if any(x.name == "device" for x in func._schema.arguments):
        kwargs["device"] = "meta"
    try:
        with _disable_current_modes():
            return func(*args, **kwargs)
    except NotImplementedError as error:
        raise Unknown from error
    except (AssertionError, ValueError) as error:  # PyTorch's code in Python for such tensors
        raise _type_of(func, str(error), RuntimeError)(str(error)) from error
    except (RuntimeError, IndexError) as error:
        text = str(error)
        if "meta" in text or "on CPU" in text or "Declaration:" in text:  # not by its schema
            raise Unknown from error
        kind = _type_of(func, text, type(error))
        if kind is type(error):
            raise
        raise kind(text) from error


def _type_of(func: Any, text: str, kind: type[Exception]) -> type[Exception]:
    """Return the type of the error that PyTorch's kernel for the CPU raises with such a text."""
    name = func._opname
    if name.startswith(("argmax", "argmin")) or "over zero-size dimension" in text:
        return IndexError
    if "tensors used as indices must" in text or (name == "index" and "broadcast" in text):
        return IndexError
    return RuntimeError if name in ("max", "min") and "to be specified" in text else kind
