"""``FlaxNNModule`` makes a flax.linen module a PyTorch module on device jax."""

from __future__ import annotations

from typing import Any

import torch

from .calls import call_jax
from .environment import Environment

__all__ = ["FlaxNNModule"]


class FlaxNNModule(torch.nn.Module):
    """A flax.linen module whose variables are parameters of a PyTorch module.

    Args:
      env: the environment whose key ``flax_module.init`` gets.
      flax_module: a ``flax.linen.Module``.
      sample_args: positional arguments of ``init``: tensors on device jax or arrays.
      sample_kwargs: keyword arguments of ``init``.
    """

    def __init__(
        self,
        env: Environment,
        flax_module: Any,
        sample_args: tuple[Any, ...],
        sample_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._flax_module = flax_module
        with torch.no_grad():
            variables = call_jax(
                flax_module.init, env.prng_key, *sample_args, **(sample_kwargs or {})
            )
        self._params = _module_of(variables)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return call_jax(self._flax_module.apply, _variables_of(self._params), *args, **kwargs)


def _module_of(variables: Any) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, x in variables.items():
        if isinstance(x, torch.Tensor):
            module.register_parameter(name, torch.nn.Parameter(x, x.is_floating_point()))
        else:
            module.add_module(name, _module_of(x))
    return module


def _variables_of(module: torch.nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = dict(module.named_parameters(recurse=False))
    return {**found, **{name: _variables_of(part) for name, part in module.named_children()}}
