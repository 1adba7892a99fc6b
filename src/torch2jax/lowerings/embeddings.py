"""Embeddings and bags of them take rows of a table by their places."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .promotion import cast, wide
from .registry import lowering


@lowering("embedding")
def embedding(
    weight: Any,
    indices: Any,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    out = jnp.take(weight, indices, axis=0)
    if scale_grad_by_freq:
        out = _by_frequency(out, _frequencies(indices, weight))
    if padding_idx >= 0:  # its row has no gradient
        out = jnp.where((indices == padding_idx)[..., None], lax.stop_gradient(out), out)
    return out


@lowering("embedding_renorm")
def embedding_renorm(self: Any, indices: Any, max_norm: float, norm_type: float) -> Any:
    """Make the rows that the indices name no longer than ``max_norm``."""
    x = jnp.abs(cast(self, wide(self.dtype)))
    if norm_type == float("inf"):
        norm = jnp.max(x, 1, keepdims=True, initial=0)
    elif norm_type == 0:
        norm = jnp.sum(x != 0, 1, keepdims=True).astype(x.dtype)
    else:
        norm = jnp.sum(x**norm_type, 1, keepdims=True) ** (1 / norm_type)
    named = jnp.zeros((self.shape[0], 1), bool).at[indices.reshape(-1)].set(True)
    shorter = self * cast(max_norm / (norm + 1e-7), self.dtype)
    return jnp.where(named & (norm > max_norm), shorter, self)


def _frequencies(indices: Any, weight: Any) -> Any:
    """Return how often each index is among the indices, with a dimension to broadcast over rows."""
    count = jnp.zeros((weight.shape[0],), wide(weight.dtype)).at[indices.reshape(-1)].add(1)
    return count[indices][..., None]


@jax.custom_vjp
def _by_frequency(rows: Any, frequencies: Any) -> Any:
    """Return rows whose gradient is divided. No function has that derivative in forward mode."""
    return rows


def _by_frequency_forward(rows: Any, frequencies: Any) -> Any:
    return rows, frequencies


def _by_frequency_backward(frequencies: Any, g: Any) -> Any:
    return (g / frequencies).astype(g.dtype), None


_by_frequency.defvjp(_by_frequency_forward, _by_frequency_backward)


@lowering("embedding_dense_backward")
def embedding_dense_backward(
    grad_output: Any,
    indices: Any,
    num_weights: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> Any:
    flat = indices.reshape(-1)
    g = cast(grad_output, wide(grad_output.dtype)).reshape(flat.size, grad_output.shape[-1])
    if scale_grad_by_freq:
        count = jnp.zeros((num_weights,), g.dtype).at[flat].add(1)
        g = g / count[flat][:, None]
    out = jnp.zeros((num_weights, g.shape[-1]), g.dtype).at[flat].add(g)
    if padding_idx >= 0:
        out = out.at[padding_idx].set(0)
    return cast(out, grad_output.dtype)


@lowering("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(
    weight: Any,
    indices: Any,
    offsets: Any,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:
    """Return (bags, bag of each index, size of each bag, place of each maximum).

    ``mode`` 0 is the sum, 1 the mean, 2 the maximum."""
    bags = offsets.shape[0] - include_last_offset
    n = indices.shape[0]
    bag = jnp.searchsorted(offsets[:bags], jnp.arange(n, dtype=offsets.dtype), side="right") - 1
    counted = indices != padding_idx
    size = jnp.zeros((bags,), indices.dtype).at[bag].add(counted.astype(indices.dtype))
    rows = weight[indices]
    if mode != 2:
        rows = cast(rows, wide(rows.dtype))
    if scale_grad_by_freq:
        rows = _by_frequency(rows, _frequencies(indices, weight))
    if per_sample_weights is not None:
        rows = rows * cast(per_sample_weights, rows.dtype)[:, None]
    shape = (bags, weight.shape[1])
    none = jnp.zeros((0,), indices.dtype)
    if mode == 2:
        rows = jnp.where(counted[:, None], rows, -jnp.inf)
        best = jnp.full(shape, -jnp.inf, rows.dtype).at[bag].max(lax.stop_gradient(rows))
        first = jnp.where(rows == best[bag], jnp.arange(n)[:, None], n)
        first = jnp.full(shape, n).at[bag].min(lax.stop_gradient(first))
        empty = (size == 0)[:, None]
        picked = jnp.take_along_axis(rows, jnp.where(empty, 0, first), 0) if n else 0 * best
        places = jnp.where(empty, 0, indices[jnp.where(empty, 0, first)] if n else 0)
        return jnp.where(empty, 0, picked).astype(weight.dtype), bag, size, places
    rows = jnp.where(counted[:, None], rows, 0)
    out = jnp.zeros(shape, rows.dtype).at[bag].add(rows)
    if mode == 1:
        out = out / jnp.maximum(size, 1)[:, None]
    return cast(out, weight.dtype), bag.astype(indices.dtype), size, none


@lowering("_embedding_bag_dense_backward")
def embedding_bag_dense_backward(
    grad: Any,
    indices: Any,
    offset2bag: Any,
    bag_size: Any,
    maximum_indices: Any,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    per_sample_weights: Any,
    padding_idx: int = -1,
) -> Any:
    """Return the gradient of the table.

    PyTorch's kernel for CPU divides by the frequency of another index.
    """
    g = cast(grad, wide(grad.dtype))
    out = jnp.zeros((num_weights, g.shape[1]), g.dtype)
    if mode == 2:
        g = jnp.where((bag_size > 0)[:, None], g, 0)
        out = out.at[maximum_indices, jnp.arange(g.shape[1])].add(g)
        return cast(out, grad.dtype)
    if mode == 1:
        g = g / jnp.maximum(bag_size, 1)[:, None]
    rows = g[offset2bag]
    if per_sample_weights is not None:
        rows = rows * cast(per_sample_weights, rows.dtype)[:, None]
    if scale_grad_by_freq:
        rows = rows / _frequencies(indices, out)
    rows = jnp.where((indices == padding_idx)[:, None], 0, rows)
    return cast(out.at[indices].add(rows), grad.dtype)


@lowering("_embedding_bag_backward")
def embedding_bag_backward(
    grad: Any,
    indices: Any,
    offsets: Any,
    offset2bag: Any,
    bag_size: Any,
    maximum_indices: Any,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Any,
    padding_idx: int = -1,
) -> Any:
    return embedding_bag_dense_backward(
        grad,
        indices,
        offset2bag,
        bag_size,
        maximum_indices,
        num_weights,
        scale_grad_by_freq,
        mode,
        per_sample_weights,
        padding_idx,
    )


@lowering("_embedding_bag_per_sample_weights_backward")
def embedding_bag_per_sample_weights_backward(
    grad: Any,
    weight: Any,
    indices: Any,
    offsets: Any,
    offset2bag: Any,
    mode: int,
    padding_idx: int = -1,
) -> Any:
    """Return the gradient of the factors of a bag's rows, which only sums have."""
    rows = cast(grad, wide(grad.dtype))[offset2bag] * cast(weight, wide(weight.dtype))[indices]
    return cast(jnp.where(indices == padding_idx, 0, jnp.sum(rows, 1)), grad.dtype)
