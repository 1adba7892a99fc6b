"""Calls on platforms without a handler (TPUs) run on the host, by JAX's own callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax.experimental import io_callback

from ..._conversions.convert import j2t
from ..._conversions.dtypes import dtype_j2t
from ..torch_side import ambient
from ..torch_side.callee import Callee
from . import entries


def call_on_host(
    *operands: Any,
    callee: Callee,
    results: Sequence[tuple[tuple[int, ...], Any]],
    orders: int | None,
) -> Sequence[Any]:
    """Compute what the primitive does; operands and results are copied to and from the host."""
    del orders
    options = callee.options
    shapes = [jax.ShapeDtypeStruct(*result) for result in results]
    if options.side_effects or options.draws:
        return io_callback(_on_arrays(callee, shapes), shapes, *operands)
    return jax.pure_callback(_on_arrays(callee, shapes), shapes, *operands)


def _on_arrays(
    callee: Callee, shapes: Sequence[jax.ShapeDtypeStruct]
) -> Callable[..., list[np.ndarray[Any, Any]]]:
    run, collect = entries.runnable(callee)
    passes_outputs = callee.parent is None and callee.options.pass_outputs

    def call(*arrays: Any) -> list[np.ndarray[Any, Any]]:
        # These are copies, because fn may change them in place.
        tensors = [j2t(np.asarray(x)) for x in arrays]
        if passes_outputs:
            tensors += [torch.empty(x.shape, dtype=dtype_j2t(x.dtype)) for x in shapes]
        out = ambient.run_guarded(run, tuple(tensors), callee.options.default_dtype)
        if collect is not None and not isinstance(out, tuple):
            out = collect(out)
        return [_to_numpy(t, x.dtype) for t, x in zip(out, shapes, strict=True)]

    return call


def _to_numpy(tensor: torch.Tensor, dtype: Any) -> np.ndarray[Any, Any]:
    tensor = (
        tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    )
    if dtype.isbuiltin != 1:  # it is none of NumPy's own: bfloat16 or float8
        tensor = tensor.view(torch.uint8 if dtype.itemsize == 1 else torch.int16)
    return tensor.numpy().view(dtype)
