"""Attention is one operator, as in PyTorch's fused kernels."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

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
    return cast(jnp.einsum("...qk,...kd->...qd", safe_softmax(scores, -1), v), dtype)
