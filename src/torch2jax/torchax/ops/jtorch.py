"""Users override PyTorch's functions under torchax's names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ...lowerings.attention import scaled_dot_product_attention as _of_arrays
from ..calls import call_jax
from .ops_registry import register_torch_function_op

__all__ = ["register_function"]


def register_function(torch_func: Any, **options: Any) -> Callable[[Any], Any]:
    """Register the decorated function for one of PyTorch's; see ``register_torch_function_op``."""
    return functools.partial(register_torch_function_op, torch_func, **options)


def _sdpa_reference(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """Return attention of tensors by plain matrix products, whatever overrides PyTorch's own."""
    if dropout_p:
        return torch.ops.aten._scaled_dot_product_attention_math.default(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    options = {"scale": scale, "enable_gqa": enable_gqa}
    return call_jax(_of_arrays, query, key, value, attn_mask, 0.0, is_causal, **options)
