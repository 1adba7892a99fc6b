"""PyTorch modules become Equinox modules: ``from torch2jax.equinox import TorchModule``.

This module alone imports Equinox; the package itself never does.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import jax
import torch

from ._errors import SignatureError
from ._from_module import Apply, Variables, from_module, to_state_dict

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError(
        f"{__name__} needs Equinox, which cannot be imported ({error}): "
        "pip install 'torch2jax-ffi[equinox]'"
    ) from error

__all__ = ["TorchModule", "trainable"]


class TorchModule(eqx.nn.StatefulLayer):
    """A ``TorchModule`` is a PyTorch module as an ``eqx.Module``.

    Its leaves are the module's tensors as JAX arrays. It is used like any other: alone or inside
    other modules and ``eqx.nn.Sequential``, under ``eqx.filter_jit``, ``eqx.filter_grad``,
    ``eqx.filter_vmap`` and ``jax.vmap``, with ``eqx.tree_at`` and ``eqx.tree_serialise_leaves``.
    The PyTorch module is copied and never changed.

    A module with buffers (BatchNorm's statistics) is a stateful layer as ``eqx.nn.BatchNorm`` is:
    make it with ``eqx.nn.make_with_state``, and a call takes the state and returns it updated.
    Without buffers there is no state: ``model(x)`` returns the output. Unlike ``eqx.nn``'s own
    layers it takes a whole batch where the PyTorch module does; it needs no ``jax.vmap`` and no
    ``axis_name``.

    Attributes:
      params: ``{name: array}``, with the names of ``state_dict()``; tied weights are one.
      frozen: the parameters with ``requires_grad=False``. Their gradients are zeros that cost
        nothing, but ``eqx.is_inexact_array`` selects them: give optimizers what ``trainable``
        selects.
      buffers: the index of the buffers in the state, or None.
      inference: True in evaluation mode. It begins as the PyTorch module is and changes with
        ``eqx.nn.inference_mode``.

    Examples:
      >>> import equinox as eqx, jax.numpy as jnp, torch
      >>> model = TorchModule(torch.nn.Linear(3, 2))
      >>> model(jnp.ones((5, 3))).shape
      (5, 2)
      >>> eqx.filter_grad(lambda model, x: model(x).sum())(model, jnp.ones((5, 3))).params["bias"]
      Array([5., 5.], dtype=float32)

      A module with buffers has a state:

      >>> model, state = eqx.nn.make_with_state(TorchModule)(torch.nn.BatchNorm1d(3))
      >>> out, state = eqx.filter_jit(model)(jnp.ones((5, 3)), state)
      >>> model.variables(state)["buffers"]["num_batches_tracked"]
      Array(1, dtype=int32)
      >>> out, state = eqx.nn.inference_mode(model)(jnp.ones((1, 3)), state)
    """

    params: dict[str, Any]
    frozen: dict[str, Any]
    buffers: eqx.nn.StateIndex | None
    inference: bool
    apply: Apply = eqx.field(static=True)

    def __init__(self, module: torch.nn.Module, *example_args: Any, **options: Any) -> None:
        """Copy the module's tensors.

        Args:
          module: any ``torch.nn.Module``.
          *example_args: tensors with which a module with lazy parameters is run once, on a copy.
          **options: options of ``torch2jax``: ``depth``, ``vmap_method``, ``residuals``...

        Raises:
          SignatureError: if ``module`` is no module, or is lazy and no examples are given.
        """
        # The module's keywords travel in a dict, so that none of their names clashes with apply's.
        apply, variables = from_module(module, *example_args, kwargs=True, **options)
        self.apply = apply
        self.params, self.frozen = variables["params"], variables["frozen"]
        self.buffers = eqx.nn.StateIndex(variables["buffers"]) if variables["buffers"] else None
        self.inference = not module.training

    def is_stateful(self) -> bool:
        """Return whether the PyTorch module has buffers, so that calls take and return a state."""
        return self.buffers is not None

    def __call__(
        self, *args: Any, key: Any = None, inference: bool | None = None, **keywords: Any
    ) -> Any:
        """Run the module's forward pass.

        Args:
          *args: what the module's ``forward`` takes: JAX arrays, trees of them, static values.
            A module with buffers takes the ``eqx.nn.State`` after them, or as ``state=``.
          key: a JAX key, for dropout and the like.
          inference: True or False instead of ``self.inference``.
          **keywords: keywords of the module's ``forward``.

        Returns:
          What ``forward`` returns, as JAX arrays; with buffers ``(output, state)``, where the
          state has the updated buffers unless in inference mode.

        Raises:
          SignatureError: where a module with buffers gets no state, or something is drawn and there
            is no key.
        """
        if inference is None:
            inference = self.inference
        state: eqx.nn.State | None = None
        if args and isinstance(args[-1], eqx.nn.State):
            args, state = args[:-1], args[-1]
        elif isinstance(keywords.get("state"), eqx.nn.State):
            state = keywords.pop("state")
        variables = self.variables(state)
        try:
            out = self.apply(variables, *args, train=not inference, rng=key, kwargs=keywords)
        except SignatureError as error:
            if key is None and "rng=" in str(error):
                error.add_note("With Equinox: key= of the call.")
            raise
        if not inference:
            out, moved = out
            if self.buffers is not None and state is not None:
                state = state.set(self.buffers, moved)
        return out if state is None else (out, state)

    def variables(self, state: eqx.nn.State | None = None) -> Variables:
        """Return the arrays, as ``from_module`` does; a module with buffers needs the state."""
        buffers: dict[str, Any] = {}
        if self.buffers is not None:
            if state is None:
                raise SignatureError(
                    f"{self.apply.__name__} has buffers, which Equinox keeps in a state: make it "
                    "by `model, state = eqx.nn.make_with_state(TorchModule)(module)` and call "
                    "`out, state = model(*args, state)`; got no state."
                )
            buffers = state.get(self.buffers)
        return {"params": self.params, "frozen": self.frozen, "buffers": buffers}

    def state_dict(self, state: eqx.nn.State | None = None) -> OrderedDict[str, torch.Tensor]:
        """Return copies on the CPU, for the PyTorch module's ``load_state_dict``."""
        return to_state_dict(self.variables(state), self.apply)


def trainable(tree: Any) -> Any:
    """Say what an optimizer should change, for ``eqx.partition`` and ``eqx.filter``.

    Args:
      tree: a ``TorchModule``, or anything with some inside.

    Returns:
      The same structure with True for arrays of inexact dtype, and False for the rest and for the
      parameters that a ``TorchModule`` holds as frozen.

    Examples:
      >>> import equinox as eqx, jax, torch
      >>> module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
      >>> module[0] = module[0].requires_grad_(False)
      >>> model = TorchModule(module)
      >>> trained, rest = eqx.partition(model, trainable(model))
      >>> sorted(name for name, x in trained.params.items() if x is not None), trained.frozen
      (['1.bias', '1.weight'], {'0.bias': None, '0.weight': None})
    """

    def select(x: Any) -> Any:
        if not isinstance(x, TorchModule):
            return eqx.is_inexact_array(x)
        # Without ``make_with_state`` the first values of the buffers are among the leaves.
        none = jax.tree.map(lambda _: False, x)
        return eqx.tree_at(lambda m: m.params, none, jax.tree.map(eqx.is_inexact_array, x.params))

    return jax.tree.map(select, tree, is_leaf=lambda x: isinstance(x, TorchModule))
