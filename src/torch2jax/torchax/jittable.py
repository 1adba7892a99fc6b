"""``JittableModule`` runs a module's methods compiled, under torchax's name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import torch
from torch.nn.utils import stateless

from ..device import random_streams
from ..device.tensors.tensor import Tensor
from .environment import Environment, default_env, words_of

__all__ = ["JittableModule", "extract_all_buffers", "set_all_buffers"]


def extract_all_buffers(
    m: torch.nn.Module, all_names: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (trainable parameters, all other tensors) of a module, each by name.

    The others are frozen parameters, buffers, and tensors that are plain attributes. With
    ``all_names`` a submodule that has several names is listed under each.
    """
    params: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for prefix, part in m.named_modules(remove_duplicate=not all_names):
        found = {**vars(part), **part._parameters, **part._buffers}
        for name, x in found.items():
            if isinstance(x, torch.Tensor):
                trainable = isinstance(x, torch.nn.Parameter) and x.requires_grad
                (params if trainable else others)[f"{prefix}.{name}" if prefix else name] = x
    return params, others


def set_all_buffers(m: torch.nn.Module, params: dict[str, Any], buffers: dict[str, Any]) -> None:
    """Replace tensors of a module by name; those of ``params`` become parameters."""
    for name, x in {**buffers, **{k: torch.nn.Parameter(v) for k, v in params.items()}}.items():
        prefix, _, last = name.rpartition(".")
        setattr(m.get_submodule(prefix), last, x)


class JittableModule(torch.nn.Module):
    """A jittable module runs its methods compiled, with its parameters and buffers as inputs.

    Args:
      m: a module on device jax. Tensors that are plain attributes and on another device are
        constants.
      env: the environment whose properties and random numbers a call uses.
      extra_jit_args: options of ``jax.jit`` for a function of ``(params, buffers, *args)``.
      dedup_parameters: whether tied parameters have one name in ``params``.

    A training step may replace ``params`` and ``buffers``. ``isinstance`` and all other attributes
    answer as the module itself does. What a method writes to buffers is not kept.

    >>> import torch, torch2jax.torchax as torchax
    >>> model = torchax.interop.JittableModule(torch.nn.Linear(3, 2).to("jax"))
    >>> model(torch.ones(4, 3, device="jax")).shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        m: torch.nn.Module,
        env: Environment | None = None,
        extra_jit_args: dict[str, Any] | None = None,
        dedup_parameters: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(env, dict):  # torchax 0.0.13 has this order
            env, extra_jit_args = None, env
        self._model = m
        self._env = env or default_env()
        self._extra_jit_args = extra_jit_args or {}
        self._jitted: dict[str, Callable[..., Any]] = {}
        # torchax's programs read and replace these dicts. ``buffers`` hides a method of Module.
        self.params: dict[str, Any]
        self.buffers: Any
        self.params, self.buffers = extract_all_buffers(m)
        if dedup_parameters:
            names = {id(x): k for k, x in reversed(self.params.items())}
            self.params = {k: x for k, x in self.params.items() if names[id(x)] == k}

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        if name == "_model":
            return super().__getattr__(name)
        jitted = self.__dict__.get("_jitted", {})
        return jitted[name] if name in jitted else getattr(self._model, name)

    def functional_call(
        self, method_or_name: str | Callable[..., Any], params: Any, buffers: Any, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Call a method with these parameters and buffers in place of the module's.

        Args:
          method_or_name: a method's name, or a function ``(module, *args, **kwargs)``.
          params: tensors by name.
          buffers: tensors by name.
          *args: the method's arguments. A JAX key for random numbers may stand in front of them.
          **kwargs: the method's keyword arguments.
        """
        key: Any = contextlib.nullcontext()
        if args and _is_key(args[0]):
            key, args = random_streams.drawing_from(words_of(args[0]), words=True), args[1:]
        if isinstance(method_or_name, str):
            method = getattr(self._model, method_or_name)
        elif callable(method_or_name):
            method = functools.partial(method_or_name, self._model)
        else:
            raise TypeError(
                "functional_call takes the name of a method or a function, got "
                f"{type(method_or_name).__name__}."
            )
        tensors = self._everywhere({**params, **buffers})
        with self._env, key, stateless._reparametrize_module(self._model, tensors):
            return method(*args, **kwargs)

    def _everywhere(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the tensors by name, with tied ones at all their places, once in each module."""
        new = {}
        for name, x in given.items():
            prefix, _, last = name.rpartition(".")
            new[id(getattr(self._model.get_submodule(prefix), last))] = x
        trainable, others = extract_all_buffers(self._model, all_names=False)
        places = {**trainable, **others}
        return {name: new[id(x)] for name, x in places.items() if id(x) in new}

    @contextlib.contextmanager
    def with_rng(self, rng: Any) -> Iterator[JittableModule]:
        """Let calls in this context draw from a JAX key."""
        with self._env.override_property(prng=rng):
            yield self

    def make_jitted(self, key: str) -> None:
        """Let the method of this name run compiled from now on."""
        from .calls import jax_jit

        compiled = jax_jit(functools.partial(self.functional_call, key), self._extra_jit_args)

        def call(*args: Any, **kwargs: Any) -> Any:
            plain = {k: x for k, x in self.buffers.items() if self._is_input(k, x)}
            return compiled(self.params, plain, *args, **kwargs)

        self._jitted[key] = call

    def _is_input(self, name: str, x: Any) -> bool:
        """Say whether it is an input: a plain attribute on another device is a constant."""
        prefix, _, last = name.rpartition(".")
        part = self._model.get_submodule(prefix)
        return isinstance(x, Tensor) or last in part._buffers or last in part._parameters

    def jittable_call(self, method_name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method in its compiled form."""
        if method_name not in self._jitted:
            self.make_jitted(method_name)
        return self._jitted[method_name](*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.jittable_call("forward", *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)  # hooks are those of the module itself


def _is_key(x: Any) -> bool:
    if isinstance(x, torch.Tensor):
        return x.dtype is torch.uint32 and tuple(x.shape) == (2,)
    if not isinstance(x, jax.Array):
        return False
    is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return bool(is_key) or (x.dtype == "uint32" and x.shape == (2,))
