"""These are layers that write to operands unknown to their schema, and packed sequences."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from jax.core import Tracer

from ...._errors import Torch2JaxError
from ....lowerings.losses import ctc_loss
from ...tensors.tensor import Tensor, known, to_torch, wrap
from ...thread_state import state
from ..operands import NO_NESTED
from .table import aten, ordinary_way, special

# --- batch norm writes to its statistics without the schema saying so ----------------------------


@special(
    aten.native_batch_norm.default,
    aten._native_batch_norm_legit.default,
)
def _batch_norm(args: Any, kwargs: Any) -> Any:
    x, weight, bias, mean, var, training, momentum, eps = args
    functional = aten._native_batch_norm_legit_functional.default
    if mean is None:
        return aten._native_batch_norm_legit.no_stats(x, weight, bias, training, momentum, eps)
    out, saved_mean, saved_invstd, new_mean, new_var = functional(
        x, weight, bias, mean, var, training, momentum, eps
    )
    if training:
        aten.copy_.default(mean, new_mean)
        aten.copy_.default(var, new_var)
    return out, saved_mean, saved_invstd


@special(aten._batch_norm_with_update.default)
def _batch_norm_with_update(args: Any, kwargs: Any) -> Any:
    x, weight, bias, mean, var, momentum, eps = args
    out = _batch_norm((x, weight, bias, mean, var, True, momentum, eps), {})
    return (*out, wrap(jax.numpy.zeros((0,), np.uint8), torch.uint8))


# --- gradients that PyTorch makes sparse on request ----------------------------------------------

_bag_backward = ordinary_way(aten._embedding_bag_backward.default)
_SPARSE = 9
"""The argument ``sparse`` stands there."""


@special(aten._embedding_bag_backward.default)
def _embedding_bag_backward(args: Any, kwargs: Any) -> Any:
    return _bag_backward((*args[:_SPARSE], False, *args[_SPARSE + 1 :]), kwargs)


# --- nested tensors ------------------------------------------------------------------------------


@special(getattr(aten._nested_tensor_from_mask_left_aligned, "default", None))
def _no_nested_tensor(args: Any, kwargs: Any) -> bool:
    """Tell ``nn.TransformerEncoder`` that a padded batch cannot be a nested tensor."""
    return False


@special(
    aten._nested_tensor_from_tensor_list.default,
    aten._nested_tensor_from_mask.default,
    aten._nested_view_from_buffer.default,
    aten._nested_from_padded.default,
    getattr(aten._nested_view_from_jagged, "default", None),
)
def _refuse_nested(args: Any, kwargs: Any) -> Any:
    raise Torch2JaxError(NO_NESTED)


# --- lengths are on the CPU beside tensors of any device -----------------------------------------


@special(aten._pack_padded_sequence.default)
def _pack_padded_sequence(args: Any, kwargs: Any) -> Any:
    """Gather what PyTorch's own kernel says is kept. Sizes of batches stay on the CPU."""
    x, lengths, batch_first = args
    if type(lengths) is Tensor:
        lengths = to_torch(lengths, "the lengths of pack_padded_sequence")
    if batch_first:
        x = aten.transpose.int(x, 0, 1)
    steps, batch = x.shape[:2]
    index = torch.arange(steps * batch, device="cpu").view(steps, batch, 1)
    places, sizes = aten._pack_padded_sequence.default(index, lengths, False)
    rows = aten.reshape.default(x, [steps * batch, *x.shape[2:]])
    kept = wrap(jax.numpy.asarray(places.flatten().numpy(), np.int32), torch.int64)
    return aten.index_select.default(rows, 0, kept), sizes


# --- the lengths of sequences decide a shape in their losses -------------------------------------


def _ctc_loss(func: Any) -> None:
    plain = ordinary_way(func)

    @special(func)
    def handler(args: Any, kwargs: Any) -> Any:
        scores, targets, steps, sizes, *rest = args
        given = [x for x in (targets, steps, sizes) if type(x) is Tensor]
        arrays = [scores.jax(), *map(known, given)]
        if not any(isinstance(x, Tracer) for x in arrays):
            return plain(args, kwargs)
        operands = [_integers(x) for x in (targets, steps, sizes)]
        losses, alphas = ctc_loss(scores.jax(), *operands, *rest, **kwargs)
        if state.lowering and not torch.is_grad_enabled():
            losses, alphas = jax.lax.stop_gradient((losses, alphas))
        return wrap(losses, scores.dtype), wrap(alphas, scores.dtype)


def _integers(x: Any) -> Any:
    """Return an array, which is NumPy's where the values are known."""
    if isinstance(x, torch.Tensor):
        x = known(x) if type(x) is Tensor else x.numpy()
    return x if isinstance(x, Tracer) else np.asarray(x, np.int32)


_ctc_loss(aten._ctc_loss.default)
_ctc_loss(aten._ctc_loss.Tensor)
