"""PyTorch modules become Flax modules: ``from torch2jax.flax import TorchModule``.

This module alone imports Flax; the package itself never does.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import jax
import torch

from ._errors import SignatureError
from ._from_module import Variables, from_module, to_state_dict

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        f"{__name__} needs Flax, which cannot be imported ({error}): "
        "pip install 'torch2jax-ffi[flax]'"
    ) from error

__all__ = ["Buffer", "Frozen", "TorchModule"]


class Frozen(nnx.Variable):
    """A frozen parameter has ``requires_grad=False``.

    It is no ``nnx.Param``, so that no optimizer meets it.
    """


class Buffer(nnx.BatchStat):
    """A buffer of a module is selected by ``nnx.BatchStat``, as Flax's own statistics are."""


class TorchModule(nnx.Module):
    """A ``TorchModule`` is a PyTorch module as an ``nnx.Module``, with tensors as JAX arrays.

    It is used like any other: alone or inside other modules, under ``nnx.jit``, ``nnx.grad``,
    ``nnx.vmap`` and ``nnx.scan``, with ``nnx.Optimizer``, ``nnx.split`` and ``nnx.merge``. The
    PyTorch module is copied and never changed.

    Attributes:
      params: ``{name: nnx.Param}``, with the names of ``state_dict()``; tied weights are one.
      frozen: ``{name: Frozen}``, the parameters with ``requires_grad=False``, which get no gradient
        work.
      buffers: ``{name: Buffer}``. In training mode a call updates them in place, as
        ``nnx.BatchNorm`` does.
      deterministic: False in training mode. It begins as the PyTorch module is and changes with
        ``train()`` and ``eval()``, those of a module around it, or in ``nnx.view``. It is one
        switch for dropout and BatchNorm, as in PyTorch.

    Examples:
      >>> import jax.numpy as jnp, torch
      >>> from flax import nnx
      >>> model = TorchModule(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)))
      >>> {name: p.shape for name, p in sorted(model.params.items())}
      {'0.bias': (4,), '0.weight': (4, 3), '1.bias': (4,), '1.weight': (4,)}
      >>> @nnx.jit
      ... def gradients(model, x):
      ...     return nnx.grad(lambda model: (model(x) ** 2).sum())(model)
      >>> gradients(model, jnp.eye(2, 3))["params"]["0.weight"].shape
      (4, 3)
      >>> int(model.buffers["1.num_batches_tracked"][...])
      1
      >>> model.eval()
      >>> model(jnp.ones((1, 3))).shape
      (1, 4)
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *example_args: Any,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        rng_collection: str = "dropout",
        **options: Any,
    ) -> None:
        """Copy the module's tensors.

        Args:
          module: any ``torch.nn.Module``.
          *example_args: tensors with which a module with lazy parameters is run once, on a copy.
          rngs: where calls in training mode get their keys, for dropout and the like. The stream
            ``rng_collection`` is forked, as in ``nnx.Dropout``.
          rng_collection: name of the stream.
          **options: options of ``torch2jax``: ``depth``, ``vmap_method``, ``residuals``...

        Raises:
          SignatureError: if ``module`` is no module, or is lazy and no examples are given.
        """
        # The module's keywords travel in a dict, so that none of their names clashes with apply's.
        apply, variables = from_module(module, *example_args, kwargs=True, **options)
        self.apply = nnx.static(apply)
        self.params = nnx.data({k: nnx.Param(x) for k, x in variables["params"].items()})
        self.frozen = nnx.data({k: Frozen(x) for k, x in variables["frozen"].items()})
        self.buffers = nnx.data({k: Buffer(x) for k, x in variables["buffers"].items()})
        self.deterministic = not module.training
        self.rng_collection = rng_collection
        if isinstance(rngs, nnx.Rngs):
            rngs = rngs[rng_collection]
        self.rngs = nnx.data(None if rngs is None else rngs.fork())

    def __call__(
        self,
        *args: Any,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        **keywords: Any,
    ) -> Any:
        """Run the module's forward pass.

        Args:
          *args: what the module's ``forward`` takes: JAX arrays, trees of them, static values.
          rngs: a key, or where to get one; otherwise the ``rngs`` of the constructor are asked,
            in training mode. A module that draws in evaluation mode (one that samples) needs it
            here.
          **keywords: keywords of the module's ``forward``.

        Returns:
          What ``forward`` returns, as JAX arrays. In training mode ``buffers`` are updated.

        Raises:
          SignatureError: where something is drawn and there is no key.
        """
        train = not self.deterministic
        key = self._key(rngs, train)
        try:
            out = self.apply(self.variables(), *args, train=train, rng=key, kwargs=keywords)
        except SignatureError as error:
            if key is None and "rng=" in str(error):
                error.add_note(
                    "With Flax: rngs= of the call, or in training mode rngs= of TorchModule."
                )
            raise
        if not train:
            return out
        out, moved = out
        for name, buffer in self.buffers.items():
            buffer[...] = moved[name]
        return out

    def _key(self, rngs: nnx.Rngs | nnx.RngStream | jax.Array | None, train: bool) -> Any:
        if rngs is None and train:
            rngs = self.rngs
        if isinstance(rngs, nnx.Rngs):
            rngs = rngs[self.rng_collection]
        return rngs() if isinstance(rngs, nnx.RngStream) else rngs

    def set_view(self, deterministic: bool | None = None) -> None:
        """Change the mode; ``nnx.view`` calls it.

        Args:
          deterministic: True for evaluation mode, without dropout and with BatchNorm's running
            statistics; False for training mode.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def variables(self) -> Variables:
        """Return the arrays, as ``from_module`` does."""
        groups = {"params": self.params, "frozen": self.frozen, "buffers": self.buffers}
        return {
            group: {name: variable[...] for name, variable in held.items()}
            for group, held in groups.items()
        }

    def state_dict(self) -> OrderedDict[str, torch.Tensor]:
        """Return copies on the CPU, for the PyTorch module's ``load_state_dict``."""
        return to_state_dict(self.variables(), self.apply)
