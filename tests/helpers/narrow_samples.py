"""PyTorch's operator samples with x64 off: what is int64 in a sample arrives as int32.

PyTorch's values and gradients for int64 are right, as JAX carries them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import torch
from op_exceptions import UNDEFINED_VALUES
from op_samples import Derived, Sample, SampleInput, all_samples, is_operand, to_numpy
from torch.utils import _pytree as torch_tree

LAYOUTS = ("contiguous", "strided", "expanded", "empty")
"""How the function sees its int64 operands. An operand itself is always contiguous."""

TAKES_INDICES = {
    *("__getitem__", "_segment_reduce_lengths", "_segment_reduce_offsets", "_unsafe_masked_index"),
    *("_unsafe_masked_index_put_accumulate", "gather", "index_add", "index_copy", "index_fill"),
    *("index_put", "index_reduce_amax", "index_reduce_amin", "index_reduce_mean"),
    *("index_reduce_prod", "index_select", "nn_functional_cross_entropy", "nn_functional_ctc_loss"),
    *("nn_functional_embedding", "nn_functional_embedding_bag", "nn_functional_max_unpool1d"),
    *("nn_functional_max_unpool2d", "nn_functional_max_unpool3d", "nn_functional_nll_loss"),
    *("nn_functional_multi_margin_loss", "nn_functional_multilabel_margin_loss", "put"),
    *("nn_functional_linear_cross_entropy", "repeat_interleave", "scatter", "scatter_add"),
    *("scatter_reduce_amax", "scatter_reduce_amin", "scatter_reduce_mean", "scatter_reduce_prod"),
    *("scatter_reduce_sum", "searchsorted", "take", "take_along_dim"),
}
"""Operators whose samples of float32 hold tensors of int64."""


def in_layout(x: Any, layout: str) -> Any:
    """A leaf of a sample with the values that it has in a layout."""
    if not (is_operand(x) and x.dtype is torch.int64 and x.ndim):
        return x
    if layout == "empty":
        return x[:0]
    return x[..., :1].expand(x.shape) if layout == "expanded" else x


def arriving(sample: Sample, layout: str) -> Sample:
    """The sample as a function of contiguous operands, which gives the operator another layout."""
    chosen = [i for i, x in enumerate(sample.operands) if x.dtype is torch.int64 and x.ndim]
    shapes = [x.shape for x in sample.operands]

    def stored(x: torch.Tensor) -> torch.Tensor:
        if layout == "strided":
            return torch.stack([x, x.flip(0)], -1)
        x = x[..., :1] if layout == "expanded" else x
        return x.clone(memory_format=torch.contiguous_format)

    def seen(operands: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        xs = list(operands)
        for i in chosen:
            if layout == "strided":
                xs[i] = xs[i].select(-1, 0)
            elif layout == "expanded":
                xs[i] = xs[i].expand(shapes[i])
        return xs

    operands = [
        stored(x) if i in chosen else x.clone(memory_format=torch.contiguous_format)
        for i, x in enumerate(sample.operands)
    ]
    return replace(
        sample,
        operands=operands,
        function=lambda *xs: sample.function(*seen(xs)),
        smooth=lambda *xs: sample.smooth(*seen(xs)),
    )


def canonical(x: Any) -> np.ndarray:
    """A result of torch's as JAX carries it with x64 off."""
    array = to_numpy(x)
    narrow = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
    if array.dtype == np.int64 and not np.array_equal(narrow, array):
        raise OverflowError
    return narrow


def narrow_samples(
    op: Any, dtype: torch.dtype, layout: str
) -> Iterator[tuple[str, Any, Sample, Derived | None]]:
    """The samples with int64 operands that JAX can carry: a name, as drawn, as given, derivatives."""
    if op.name in UNDEFINED_VALUES:
        return  # int32 need not hold what lies in memory
    if op.name.startswith("as_strided") and layout != "contiguous":
        return  # its strides are those of the sample's own memory
    for i, drawn in enumerate(all_samples(op, dtype)):
        if layout in ("expanded", "empty") and (
            drawn.kwargs.get("include_last_offset")
            or (op.name == "_segment_reduce" and "offsets" in drawn.kwargs)
        ):
            continue  # the last offset has to be the number of rows: PyTorch reads beyond them
        if layout == "expanded" and op.name in ("median", "nanmedian"):
            continue  # PyTorch reads beyond the memory of rows whose elements are all one
        if layout == "empty" and op.name == "nn.functional.pixel_unshuffle":
            continue  # PyTorch gives no rows the shape of its input; its meta kernel and JAX do not
        try:
            leaves = torch_tree.tree_map(
                lambda x: in_layout(x, layout), (drawn.input, drawn.args, drawn.kwargs)
            )
            given = SampleInput(leaves[0], args=leaves[1], kwargs=leaves[2])
            given.output_process_fn_grad = drawn.output_process_fn_grad
            sample = arriving(Sample.of(op, given), layout)
            with torch.no_grad():
                expected = [canonical(x) for x in sample.function(*sample.operands)]
            derived = sample.gradients() if sample.differentiable else None
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, OverflowError):
            continue  # torch itself cannot run it, or JAX cannot carry it
        dtypes = {x.dtype for x in sample.operands}
        if torch.int64 in dtypes and not dtypes & {torch.float64, torch.complex128}:
            yield f"sample {i} ({drawn})", drawn, replace(sample, expected=expected), derived
