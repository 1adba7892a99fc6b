"""A training step under torchax's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from .interop import call_jax, jax_value_and_grad, jax_view, torch_view

__all__ = ["make_train_step"]


def make_train_step(
    model_fn: Callable[..., Any],
    loss_fn: Callable[..., Any],
    optimizer: Any,
    remat_policy: Any = None,
) -> Callable[..., Any]:
    """A step of training as a function of tensors on device jax, for ``interop.jax_jit``.

    Args:
      model_fn: ``(weights, buffers, args) -> result``.
      loss_fn: ``(result, label) -> loss``.
      optimizer: of optax.
      remat_policy: of ``jax.checkpoint``; None keeps all values.

    Returns:
      ``step(weights, buffers, opt_state, args, label) -> (loss, weights, opt_state)``.
    """

    def loss(weights: Any, buffers: Any, args: Any, label: Any) -> Any:
        return loss_fn(model_fn(weights, buffers, args), label)

    if remat_policy is not None:
        loss = torch_view(jax.checkpoint(jax_view(loss), policy=remat_policy))
    gradient = jax_value_and_grad(loss)

    def apply(weights: Any, updates: Any) -> Any:
        return jax.tree.map(lambda w, u: (w + u).astype(w.dtype), weights, updates)

    def step(weights: Any, buffers: Any, opt_state: Any, args: Any, label: Any) -> Any:
        value, grads = gradient(weights, buffers, args, label)
        updates, opt_state = call_jax(optimizer.update, grads, opt_state, weights)
        return value, call_jax(apply, weights, updates), opt_state

    return step
