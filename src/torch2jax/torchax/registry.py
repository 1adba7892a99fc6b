"""``env._ops`` says what computes each operator and function, and takes others for them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch

from .. import device as _device
from ..device.operators import dispatch
from ..device.operators.special.table import SPECIAL, special
from ..lowerings.registry import TABLE
from ..lowerings.views import GETTERS

__all__ = ["Operator", "OperatorNotFound", "Operators"]


class OperatorNotFound(Exception):
    """An environment is asked for what is neither an operator nor overridden."""


@dataclasses.dataclass
class Operator:
    """An operator has a function that computes it.

    ``func`` takes arrays where ``is_jax_function`` is true, and tensors elsewhere. With
    ``needs_env`` it takes the environment as ``env=``. ``is_user_defined`` and ``is_view_op`` have
    no effect: what is set last is used, and results share memory where ``func`` makes them.
    """

    torch_op: Any
    func: Callable[..., Any]
    is_jax_function: bool
    is_user_defined: bool
    needs_env: bool
    is_view_op: bool


class Operators(MutableMapping[Any, Operator]):
    """Each operator of ``torch.ops`` is a key, and so is each function that is overridden.

    Setting an entry overrides what it names, and deleting it undoes that. An overridden operator is
    so for all tensors on device jax. A function is overridden within the environment.

    Args:
      env: the environment.
      definitions: the overridden functions, which are functions of tensors.
    """

    def __init__(self, env: Any, definitions: dict[Any, Callable[..., Any]]) -> None:
        self._env, self._definitions = env, definitions
        self._given: dict[Any, Operator] = {}
        self._before: dict[Any, tuple[Any, Any]] = {}

    def __getitem__(self, key: Any) -> Operator:
        packet = getattr(key, "overloadpacket", key)
        given = self._given.get(key) or self._given.get(packet)
        if given is not None:
            return given
        for one in _overloads(key)[:1]:
            found = TABLE.get(one)
            if found is not None and not found.random and one not in SPECIAL:
                return Operator(key, found.fn, True, False, False, False)
            return Operator(key, key, False, False, False, False)
        raise KeyError(key)

    def __setitem__(self, key: Any, operator: Operator) -> None:
        func = operator.func
        if operator.needs_env:
            func = functools.partial(func, env=self._env)
        overloads = _overloads(key)
        for one in overloads:
            self._before.setdefault(one, (TABLE.get(one), SPECIAL.get(one)))
            self._restore(one)
            if operator.is_jax_function and one not in GETTERS:
                SPECIAL.pop(one, None)
                _device.register_lowering(one, func)
            else:
                called = self._of_arrays(func) if operator.is_jax_function else func
                special(one)(_of_tensors(called))
        if not overloads:
            self._definitions[key] = self._of_arrays(func) if operator.is_jax_function else func
        self._given[key] = operator
        dispatch.forget()

    def __delitem__(self, key: Any) -> None:
        del self._given[key]
        self._definitions.pop(key, None)
        for one in _overloads(key):
            self._restore(one)
            del self._before[one]
        dispatch.forget()

    def __iter__(self) -> Iterator[Any]:
        return iter(dict.fromkeys([*self._given, *TABLE]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _of_arrays(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of arrays as one of tensors."""
        env = self._env

        def called(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = env.t2j_iso((args, kwargs))
            return env.j2t_iso(func(*args, **kwargs))

        return called

    def _restore(self, one: Any) -> None:
        for table, was in zip((TABLE, SPECIAL), self._before[one], strict=True):
            table.pop(one, None)
            if was is not None:
                table[one] = was


def _overloads(key: Any) -> list[Any]:
    if isinstance(key, torch._ops.OpOverloadPacket):
        return [getattr(key, name) for name in key.overloads()]
    return [key] if isinstance(key, torch._ops.OpOverload) else []


def _of_tensors(func: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda args, kwargs: func(*args, **kwargs)
