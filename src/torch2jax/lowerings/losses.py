"""A linear layer with its cross entropy, some rows at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .promotion import cast, wide
from .registry import lowering


@lowering("torch_nn._linear_cross_entropy_batch_chunked")
def linear_cross_entropy(
    input: Any, linear_weight: Any, target: Any, linear_bias: Any, weight: Any, reduction: str,
    ignore_index: int, label_smoothing: float, batch_chunk_size: int, acc_policy: str,
    acc_dtype: Any, allow_retain_graph: bool, compute_input_grad: bool,
    compute_linear_weight_grad: bool, compute_linear_bias_grad: bool,
) -> Any:  # fmt: skip
    """The loss, and the gradients that are asked for, else empty arrays.

    PyTorch asks by ``requires_grad``. Traced tensors do not have it: JAX differentiates the loss.
    """

    def loss(x: Any, w: Any, b: Any) -> Any:
        losses, weights = _rows(x, w, b, target, weight, ignore_index, batch_chunk_size)
        total = jnp.sum(losses)
        return cast(total / jnp.sum(weights) if reduction == "mean" else total, input.dtype)

    operands = input, linear_weight, linear_bias
    empty = [jnp.zeros((0,) * n, input.dtype) for n in (2, 2, 1)]
    wanted = [compute_input_grad, compute_linear_weight_grad, compute_linear_bias_grad]
    if not any(wanted):
        return loss(*operands), *empty
    value, pull = jax.vjp(loss, *operands)
    gradients = pull(jnp.ones_like(value))
    found = [
        cast(g, input.dtype) if asked else e
        for g, asked, e in zip(gradients, wanted, empty, strict=True)
    ]
    return value, *found


@lowering("torch_nn._linear_cross_entropy_batch_chunked_no_reduction")
def linear_cross_entropy_of_rows(
    input: Any, linear_weight: Any, target: Any, linear_bias: Any, weight: Any, ignore_index: int,
    batch_chunk_size: int, acc_policy: str, acc_dtype: Any,
) -> Any:  # fmt: skip
    losses, _ = _rows(
        input, linear_weight, linear_bias, target, weight, ignore_index, batch_chunk_size
    )
    return cast(losses, input.dtype)


def _rows(
    x: Any, w: Any, b: Any, target: Any, weight: Any, ignore_index: int, chunk: int
) -> tuple[Any, Any]:
    """Losses of the rows, and their weights: both 0 where the target is to be ignored."""
    compute = wide(x.dtype)
    used = target != ignore_index
    label = jnp.where(used, target, 0)
    weights = jnp.ones((), compute) if weight is None else cast(weight, compute)[label]
    weights = jnp.where(used, weights, jnp.zeros((), compute))

    @jax.checkpoint  # the logits are what is large: they are made again for the backward pass
    def row(one: tuple[Any, Any]) -> Any:
        x, label = one
        logits = cast(jnp.matmul(w, x, preferred_element_type=compute), compute)
        if b is not None:
            logits = logits + cast(b, compute)
        return jax.nn.logsumexp(logits) - logits[label]

    chunk = max(1, min(chunk, len(x)))
    return jax.lax.map(row, (x, label), batch_size=chunk) * weights, weights
