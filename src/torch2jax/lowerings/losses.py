"""A linear layer and its cross entropy run some rows at a time; CTC is a loss of sequences."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .promotion import cast, wide
from .registry import lowering


@lowering("torch_nn._linear_cross_entropy_batch_chunked")
def linear_cross_entropy(
    input: Any, linear_weight: Any, target: Any, linear_bias: Any, weight: Any, reduction: str,
    ignore_index: int, label_smoothing: float, batch_chunk_size: int, acc_policy: str,
    acc_dtype: Any, allow_retain_graph: bool, compute_input_grad: bool,
    compute_linear_weight_grad: bool, compute_linear_bias_grad: bool,
) -> Any:  # fmt: skip
    """Return the loss, and the gradients that are asked for, or else empty arrays.

    PyTorch asks by ``requires_grad``. Traced tensors do not set it, because JAX differentiates the
    loss.
    """

    if label_smoothing:
        raise NotImplementedError("linear_cross_entropy does not support label smoothing")

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
    """Return losses of the rows and their weights, both 0 where the target is to be ignored."""
    compute = wide(x.dtype)
    used = target != ignore_index
    label = jnp.where(used, target, 0)
    weights = jnp.ones((), compute) if weight is None else cast(weight, compute)[label]
    weights = jnp.where(used, weights, jnp.zeros((), compute))

    @jax.checkpoint  # logits are large, so the backward pass makes them again
    def row(one: tuple[Any, Any]) -> Any:
        x, label = one
        logits = cast(jnp.matmul(w, x, preferred_element_type=compute), compute)
        if b is not None:
            logits = logits + cast(b, compute)
        return jax.nn.logsumexp(logits) - logits[label]

    chunk = max(1, min(chunk, len(x)))
    return jax.lax.map(row, (x, label), batch_size=chunk) * weights, weights


def ctc_loss(
    log_probs: Any, targets: Any, input_lengths: Any, target_lengths: Any, blank: int = 0,
    zero_infinity: bool = False,
) -> Any:  # fmt: skip
    """Return losses (batch,) of sequences, and scores of all beginnings (batch, steps, 2 S + 1).

    Let l' be the labels with blanks between and around, and y_t(k) = log_probs[t, k]. Then
        a_t(s) = y_t(l'_s) + log(exp a_{t-1}(s) + exp a_{t-1}(s-1) + [may skip] exp a_{t-1}(s-2)).
    Labels are (batch, S), or all in a row. Lengths in NumPy arrays are known while it is traced.
    """
    steps, batch, _ = log_probs.shape
    y = jnp.moveaxis(cast(log_probs, wide(log_probs.dtype)), 1, 0)  # batch, steps, classes
    if targets.ndim == 1:
        known = isinstance(target_lengths, np.ndarray)
        longest = int(target_lengths.max(initial=0)) if known else targets.shape[0]
        places = jnp.cumsum(target_lengths)[:, None] - target_lengths[:, None] + np.arange(longest)
        targets = jnp.pad(targets, (0, longest + 1))[places]
    longest = targets.shape[1]
    labels = jnp.full((batch, 2 * longest + 1), blank, jnp.int32).at[:, 1::2].set(targets)
    two_before = jnp.pad(labels, ((0, 0), (2, 0)), constant_values=blank)[:, :-2]
    skips = (labels != blank) & (labels != two_before)
    at = jnp.arange(2 * longest + 1)
    inside = at < 2 * jnp.asarray(target_lengths)[:, None] + 1
    never = jnp.asarray(-jnp.inf, y.dtype)
    scores = jnp.take_along_axis(y, jnp.broadcast_to(labels[:, None], (batch, steps, len(at))), 2)
    scores = jnp.where(inside[:, None], scores, never)

    def step(a: Any, score: Any) -> tuple[Any, Any]:
        one = jnp.pad(a, ((0, 0), (1, 0)), constant_values=-jnp.inf)[:, :-1]
        two = jnp.pad(a, ((0, 0), (2, 0)), constant_values=-jnp.inf)[:, :-2]
        new = score + _log_sum_exp(jnp.stack([a, one, jnp.where(skips, two, never)]))
        return new, new

    first = jnp.where(at < 2, scores[:, 0], never)
    _, later = jax.lax.scan(step, first, jnp.moveaxis(scores[:, 1:], 1, 0))
    alphas = jnp.concatenate([first[:, None], jnp.moveaxis(later, 0, 1)], 1)
    ends = jnp.take_along_axis(alphas, jnp.asarray(input_lengths)[:, None, None] - 1, 1)[:, 0]
    last = 2 * jnp.asarray(target_lengths)[:, None]
    end = jnp.take_along_axis(ends, last, 1)
    before = jnp.take_along_axis(ends, jnp.maximum(last - 1, 0), 1)
    both = jnp.concatenate([end, jnp.where(last > 0, before, never)], 1)
    losses = -_log_sum_exp(both.T)
    # PyTorch's gradient assumes that a softmax made the scores, and includes its derivative.
    p = jnp.where(np.arange(steps)[:, None] < jnp.asarray(input_lengths)[:, None, None], y, never)
    p = jnp.exp(p)
    losses = losses + jnp.sum(p - jax.lax.stop_gradient(p), (1, 2))
    impossible = losses == jnp.inf  # there are too few steps for the labels
    if zero_infinity:
        losses = jnp.where(impossible, 0, losses)
    else:  # PyTorch's gradient is NaN there, as that of log is at 0
        nothing = jnp.where(impossible[:, None, None], p * 0, 1)
        losses = jnp.where(impossible, -jnp.log(jnp.sum(nothing, (1, 2))), losses)
    return cast(losses, log_probs.dtype), cast(jax.lax.stop_gradient(alphas), log_probs.dtype)


def _log_sum_exp(x: Any) -> Any:
    """Reduce the first axis. Of -inf alone the result is -inf, with derivative 0."""
    top = jax.lax.stop_gradient(jnp.max(x, 0))
    none = top == -jnp.inf
    total = jnp.sum(jnp.exp(x - jnp.where(none, 0, top)), 0)
    return jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1, total)) + top)
