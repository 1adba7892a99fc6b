"""Attention is one operator, as in PyTorch's fused kernels."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .normalization import safe_softmax
from .promotion import cast, wide
from .registry import lowering


@lowering("scaled_dot_product_attention")
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout_p:
        raise NotImplementedError("attention with dropout is decomposed before it comes here")
    return _attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)[0]


@lowering("_scaled_dot_product_flash_attention_for_cpu")
def scaled_dot_product_flash_attention_for_cpu(
    query: Any,
    key: Any,
    value: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: float | None = None,
) -> tuple[Any, Any]:
    """PyTorch's decomposition gives the weights in place of the second result, its logsumexp."""
    if dropout_p:
        raise NotImplementedError("this attention has no dropout, as in PyTorch")
    out, scores = _attention(query, key, value, attn_mask, is_causal, scale, True)
    return out, lax.stop_gradient(jax.nn.logsumexp(scores, -1))


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Any, Any]:
    """Return the attention, and the scores that its softmax takes."""
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = jnp.repeat(key, times, -3), jnp.repeat(value, times, -3)
    dtype = query.dtype
    q, k, v = (cast(x, wide(dtype)) for x in (query, key, value))
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = jnp.einsum("...qd,...kd->...qk", q, k) * factor
    if is_causal:
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(mask, scores, -jnp.inf)
    if attn_mask is not None:
        if attn_mask.dtype == bool:
            scores = jnp.where(attn_mask, scores, -jnp.inf)
        else:
            scores = scores + cast(attn_mask, scores.dtype)
    out = jnp.einsum("...qk,...kd->...qd", safe_softmax(scores, -1), v)
    return cast(out, dtype), scores
