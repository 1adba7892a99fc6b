"""A recurrent layer in one direction is one ``lax.scan`` over its steps.

Let x be the input of a step, and h (LSTM: and c) the state before it. W and V are their weights:

    RNN   h' = act(W x + V h)
    GRU   r, z = sigmoid(W x + V h),  n = tanh(W x + r * (V h)),  h' = (h - n) z + n
    LSTM  i, f, o = sigmoid(W x + V h),  g = tanh(W x + V h),  c' = f c + i g,  h' = o tanh(c')

With a projection an LSTM has h' = P o tanh(c'). W x of all steps is one product in front of the
scan.

Sequences of several lengths come packed, as in PyTorch: first the rows of step 0, then those of
step 1, and so on. A step has as many rows as sequences have that step. The scan runs on padded
steps, and where a sequence has no such step its state stays. So the reverse direction starts at
each sequence's own end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .activations import rectified

__all__ = ["layer", "pack", "pad"]


def layer(
    kind: str,
    x: Any,
    state: Sequence[Any],
    weights: Sequence[Any],
    *,
    biases: bool,
    reverse: bool,
    sizes: Any = None,
    cast: Any = None,
) -> tuple[Any, tuple[Any, ...]]:
    """Return the outputs of all steps, and the state after the last one.

    Args:
      kind: "lstm", "gru", "rnn_tanh" or "rnn_relu".
      x: (steps, batch, features).
      state: h, and c of an LSTM: (batch, hidden).
      weights: those of inputs and of the state, their biases if any, then the projection's.
      biases: whether there are biases.
      reverse: whether it runs from the last step to the first.
      sizes: how many sequences have each step; None if all have.
      cast: the dtype of products under autocast.
    """
    if cast is not None:
        x, weights = x.astype(cast), [w.astype(cast) for w in weights]
    w_x, w_h, *rest = weights
    b_x, b_h = rest[:2] if biases else (None, None)
    projection = rest[-1] if len(rest) > 2 * biases else None
    of_inputs = _linear(x, w_x, b_x)
    cell = _CELLS[kind]

    def step(carry: Any, row: Any) -> Any:
        from_x, alive = row
        h = carry[0] if cast is None else carry[0].astype(cast)
        new = cell(carry, from_x, _linear(h, w_h, b_h))
        if projection is not None:
            new = (_linear(new[0].astype(projection.dtype), projection, None), *new[1:])
        if alive is not None:
            new = tuple(
                jnp.where(alive[:, None], a, b.astype(a.dtype))
                for a, b in zip(new, carry, strict=True)
            )
        return new, new[0]

    alive = None
    if sizes is not None:
        alive = jnp.arange(x.shape[1]) < jnp.asarray(sizes)[:, None]
    rows = (of_inputs, alive)
    # Under autocast a state can have another dtype after a step than before the first one.
    dtypes = jax.eval_shape(step, tuple(state), jax.tree.map(lambda a: a[0], rows))[0]
    start = tuple(a.astype(d.dtype) for a, d in zip(state, dtypes, strict=True))
    end, outputs = jax.lax.scan(step, start, rows, reverse=reverse)
    return outputs, end


def _linear(x: Any, weight: Any, bias: Any) -> Any:
    product = x @ weight.T
    return product if bias is None else product + bias


def _rnn_tanh(state: Any, from_x: Any, from_h: Any) -> tuple[Any, ...]:
    return (jnp.tanh(from_x + from_h),)


def _rnn_relu(state: Any, from_x: Any, from_h: Any) -> tuple[Any, ...]:
    return (rectified(from_x + from_h),)


def _gru(state: Any, from_x: Any, from_h: Any) -> tuple[Any, ...]:
    (h,) = state
    r_x, z_x, n_x = jnp.split(from_x, 3, -1)
    r_h, z_h, n_h = jnp.split(from_h, 3, -1)
    r, z = jax.nn.sigmoid(r_x + r_h), jax.nn.sigmoid(z_x + z_h)
    n = jnp.tanh(n_x + r * n_h)
    return ((h - n) * z + n,)


def _lstm(state: Any, from_x: Any, from_h: Any) -> tuple[Any, ...]:
    _, c = state
    i, f, g, o = jnp.split(from_x + from_h, 4, -1)
    new = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(new), new


_CELLS = {"rnn_tanh": _rnn_tanh, "rnn_relu": _rnn_relu, "gru": _gru, "lstm": _lstm}


# --- packed sequences: ``sizes`` are numbers, one for each step ----------------------------------


def pad(rows: Any, sizes: Sequence[int], steps: int, filling: Any = 0) -> Any:
    """Return packed rows as (steps, batch, ...), with ``filling`` after a sequence's end."""
    full = np.zeros(steps, np.int32)
    full[: len(sizes)] = sizes
    starts = jnp.asarray(np.cumsum(full) - full, np.int32)[:, None]
    batch = jnp.arange(full[0], dtype=np.int32)
    alive = batch < jnp.asarray(full)[:, None]
    found = rows[jnp.where(alive, starts + batch, 0)]
    alive = alive.reshape(*alive.shape, *[1] * (rows.ndim - 1))
    return jnp.where(alive, found, jnp.asarray(filling, rows.dtype))


def pack(padded: Any, sizes: Sequence[int]) -> Any:
    """Return the packed rows of padded steps: the inverse of ``pad``."""
    total, each = int(sum(sizes)), np.asarray(sizes, np.int32)
    step = jnp.repeat(jnp.arange(len(each)), each, total_repeat_length=total)
    first = jnp.asarray(np.cumsum(each) - each, np.int32)
    return padded[step, jnp.arange(total) - first[step]]
