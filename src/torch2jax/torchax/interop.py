"""Calls between PyTorch and JAX under torchax's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import torch

from ..device.interop import (
    call_jax,
    call_torch,
    checkpoint,
    extract,
    jax_view,
    torch_view,
    value_and_grad,
)
from ..device.sharding import mark_sharding, shard_map
from ..device.tensor import Tensor

__all__ = [
    "JittableModule",
    "call_jax",
    "call_torch",
    "extract_all_buffers",
    "gradient_checkpoint",
    "jax_jit",
    "jax_shard_map",
    "jax_value_and_grad",
    "jax_view",
    "torch_view",
]

gradient_checkpoint = checkpoint
jax_shard_map = shard_map
jax_value_and_grad = value_and_grad
extract_jax = extract


def jax_jit(
    fn: Callable[..., Any], kwargs_for_jax_jit: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """``jax.jit`` of a function of tensors on device jax that closes over none."""
    return torch_view(jax.jit(jax_view(fn), **(kwargs_for_jax_jit or {})))


def extract_all_buffers(module: torch.nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters, buffers) of a module by name."""
    return dict(module.named_parameters()), dict(module.named_buffers())


class JittableModule(torch.nn.Module):
    """A module whose methods run compiled, with its parameters and buffers as inputs.

    Args:
      module: on device jax.
      extra_jit_args: options of ``jax.jit``.
      dedup_parameters: tied parameters are one input; always so here.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        extra_jit_args: dict[str, Any] | None = None,
        dedup_parameters: bool = True,
    ) -> None:
        super().__init__()
        self._model = module
        self._options = extra_jit_args or {}
        self._jitted: dict[str, Callable[..., Any]] = {}

    @property
    def params(self) -> dict[str, Any]:
        return dict(self._model.named_parameters())

    @property
    def buffers_(self) -> dict[str, Any]:
        return dict(self._model.named_buffers())

    def functional_call(
        self, method: str | Callable[..., Any], params: Any, buffers: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A method with these parameters and buffers in place of the module's."""
        if method in ("forward", "__call__"):
            return torch.func.functional_call(self._model, {**params, **buffers}, args, kwargs)
        name = method if isinstance(method, str) else method.__name__
        return torch.func.functional_call(
            _Method(self._model, name), {f"model.{k}": x for k, x in {**params, **buffers}.items()},
            args, kwargs,
        )  # fmt: skip

    def make_jitted(self, name: str) -> Callable[..., Any]:
        """A method as a compiled function, kept under its name."""
        found = self._jitted.get(name)
        if found is None:

            def call(params: Any, buffers: Any, *args: Any, **kwargs: Any) -> Any:
                return self.functional_call(name, params, buffers, *args, **kwargs)

            compiled = jax_jit(call, self._options)

            def method(*args: Any, **kwargs: Any) -> Any:
                return compiled(self.params, self.buffers_, *args, **kwargs)

            found = self._jitted[name] = method
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.make_jitted("forward")(*args, **kwargs)


class _Method(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model, self.name)(*args, **kwargs)


def apply_jax(self: Tensor, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``fn(array, ...)`` as a tensor."""
    return call_jax(fn, self, *args, **kwargs)


def apply_jax_(self: Tensor, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Replace the tensor's values by ``fn(array, ...)``."""
    with torch.no_grad():
        return self.copy_(call_jax(fn, self, *args, **kwargs))


def shard_(self: Tensor, sharding: Any) -> Tensor:
    """Put the tensor's values on the devices of a ``jax.sharding.Sharding``."""
    return mark_sharding(self, sharding)


Tensor.apply_jax = apply_jax  # type: ignore[attr-defined]
Tensor.apply_jax_ = apply_jax_  # type: ignore[attr-defined]
Tensor.shard_ = shard_  # type: ignore[attr-defined]
