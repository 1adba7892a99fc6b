"""A training step, and equal layers as one scan, have torchax's names here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch

from .calls import call_jax, torch_view
from .interop import gradient_checkpoint, jax_value_and_grad

__all__ = ["ScannedModule", "make_train_step", "mark_sharding", "remat"]

remat = torch_view(jax.checkpoint)
mark_sharding = torch_view(jax.lax.with_sharding_constraint)


def make_train_step(
    model_fn: Callable[..., Any],
    loss_fn: Callable[..., Any],
    optax_optimizer: Any,
    remat_policy: Any = None,
) -> Callable[..., Any]:
    """Make a training step, which is a function of tensors on device jax for ``jax_jit``.

    Args:
      model_fn: ``(weights, buffers, args) -> result``.
      loss_fn: ``(result, label) -> loss``.
      optax_optimizer: an optimizer of optax.
      remat_policy: a policy of ``jax.checkpoint``; None keeps all values.

    Returns:
      ``step(weights, buffers, opt_state, args, label) -> (loss, weights, opt_state)``.
    """

    def loss(weights: Any, buffers: Any, args: Any, label: Any) -> Any:
        return loss_fn(model_fn(weights, buffers, args), label)

    if remat_policy is not None:
        loss = gradient_checkpoint(loss, {"policy": remat_policy})
    gradient = jax_value_and_grad(loss)

    def apply(weights: Any, updates: Any) -> Any:
        return jax.tree.map(lambda w, u: (w + u).astype(w.dtype), weights, updates)

    def step(weights: Any, buffers: Any, opt_state: Any, args: Any, label: Any) -> Any:
        value, grads = gradient(weights, buffers, args, label)
        updates, opt_state = call_jax(optax_optimizer.update, grads, opt_state, weights)
        return value, call_jax(apply, weights, updates), opt_state

    return step


class _Hidden:
    """A hidden module is no submodule of its owner, because its own parameters are not used."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module


class ScannedModule(torch.nn.Module):
    """A scanned module runs equal layers as one ``jax.lax.scan`` over stacked parameters.

    Args:
      module_list: modules of one structure. The first argument of each is what the one before
        returns; further arguments are the same for all.
      checkpoint_policy: a policy of ``jax.checkpoint``, which says what a layer keeps for the
        backward pass. None keeps only its input.

    ``params`` holds each tensor of a layer under its name, with ``___`` for dots. Its first
    dimension counts the layers. ``torch2jax.device.scan`` leaves parameters where they are.
    """

    def __init__(
        self, module_list: Sequence[torch.nn.Module], checkpoint_policy: Any = None
    ) -> None:
        super().__init__()
        if not module_list:
            raise ValueError("ScannedModule takes at least one layer.")
        states = [dict(m.state_dict()) for m in module_list]
        self.params = torch.nn.ParameterDict(
            {
                name.replace(".", "___"): _stacked([state[name] for state in states])
                for name in states[0]
            }
        )
        self.c = _Hidden(module_list[0])
        self.layer_weights_keys = list(states[0])
        self.checkpoint_policy = checkpoint_policy

    def forward(self, x: Any, *rest: Any) -> Any:
        weights = {k: self.params[k.replace(".", "___")] for k in self.layer_weights_keys}

        def layer(carry: Any, row: Any) -> Any:
            out = torch.func.functional_call(self.c.module, row, carry)
            return (out, *carry[1:]), None

        body = gradient_checkpoint(layer, {"policy": self.checkpoint_policy})
        (out, *_), _ = call_jax(jax.lax.scan, body, (x, *rest), weights)
        return out


def _stacked(tensors: list[torch.Tensor]) -> torch.nn.Parameter:
    x = torch.stack([t.detach() for t in tensors])
    return torch.nn.Parameter(x, x.is_floating_point() or x.is_complex())
