"""A wrapped function turns a Python call into a call of the primitive."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import torch
from jax.tree_util import tree_flatten, tree_flatten_with_path

from ... import _refusals
from ..._compat.jax import ArrayImpl, varying_everywhere
from ..._conversions.dtypes import x64_enabled
from ..._errors import SignatureError, TorchCallError
from ..jax_side.primitive import call as call_primitive
from ..torch_side import exceptions
from ..torch_side.callee import Callee
from ..torch_side.inference import ValuesNeeded
from . import checks
from .arguments import Static, arguments_of, mark_static
from .operands import OperandOptions, values_of
from .options import Options
from .planning import Avals, Binding, Known, Planner
from .shards import Shards


class _Call:
    """The structure of a call selects a trace, together with shapes and dtypes. It is interned."""

    def __init__(
        self,
        treedef: Any,
        statics: tuple[tuple[int, Static], ...],
        trace: Callable[..., Any],
        name: str,
    ) -> None:
        self.arguments = arguments_of(treedef, statics)

        # It is a function of its own, so that its name and not a class's stands in profiles.
        def traced(*operands: Any) -> Any:
            return trace(self, *operands)

        traced.__name__ = traced.__qualname__ = name
        self.jitted = jax.jit(traced, inline=True)


class _Knowing(threading.local):
    """A ``_Knowing`` holds what this thread knows of the call whose trace needs values."""

    now: Known | None = None


class TorchFunction:
    """A ``TorchFunction`` is a PyTorch function as a JAX function; ``torch2jax`` makes it."""

    _traced_again: tuple[type[Exception], ...] = (ValuesNeeded,)
    """After these errors ``_knowing`` traces once more."""

    def __init__(
        self, fn: Callable[..., Any], run: Callable[..., Any], label: str, options: Options
    ) -> None:
        self.__wrapped__ = fn
        self.__name__ = getattr(fn, "__name__", None) or type(fn).__name__
        self.__qualname__ = label
        self.__doc__ = fn.__doc__
        self.__module__ = getattr(fn, "__module__", None) or type(fn).__module__
        self._options = options
        self._label = label
        self._planner = Planner(fn, run, label, options)
        self._bindings: dict[Hashable, Binding] = {}
        self._calls: dict[Hashable, _Call] = {}
        self._known = _Knowing()
        self._positional: dict[int, Callable[..., Any]] = {}
        self._static = functools.partial(Static, label=label)
        self._plain = not (options.static_argnums or options.static_argnames)

    def __repr__(self) -> str:
        return f"torch2jax({self._label})"

    def is_plain(self) -> bool:
        """Return whether arguments, results and derivatives are those of the function itself."""
        return self._options.changes_nothing()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Arrays by position, in a number met before, take the quick path to jit's own.
        jitted = None
        if not kwargs:
            for a in args:
                if type(a) is not ArrayImpl:
                    break
            else:
                jitted = self._positional.get(len(args))
        if jitted is None:
            return self._call_any(args, kwargs)
        try:
            return jitted(*args)
        except self._traced_again:
            return self._call_any(args, kwargs)
        except _RUNTIME_ERRORS as error:
            _raise_original(error, self._label)
            raise

    def _call_any(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, operands = self._flatten(args, kwargs)
        try:
            return self._knowing(call, operands, call.jitted)
        except _RUNTIME_ERRORS as error:
            _raise_original(error, self._label)
            self._check_operands(call, operands)
            raise
        except (TypeError, OverflowError):
            self._check_operands(call, operands)
            raise

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Return ``jax.stages.Lowered`` for arguments, which may be ``jax.ShapeDtypeStruct``s."""
        call, operands = self._flatten(args, kwargs)
        return self._knowing(call, operands, call.jitted.lower)

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """Return ``jax.stages.Traced`` for arguments, which may be ``jax.ShapeDtypeStruct``s."""
        call, operands = self._flatten(args, kwargs)
        return self._knowing(call, operands, call.jitted.trace)

    def _knowing(self, call: _Call, operands: Sequence[Any], run: Callable[..., Any]) -> Any:
        """Return ``run(*operands)``; where a trace needs values, trace with what is known."""
        try:
            return run(*operands)
        except ValuesNeeded:
            pass
        outer = self._known.now
        self._known.now = Known(values_of(operands[:-1] if self._options.stochastic else operands))
        try:
            return run(*operands)
        finally:
            self._known.now = outer

    def callee_for(self, args: Any, kwargs: Any) -> tuple[Callee, Avals]:
        """Return the callee of calls with such arguments, and the avals of its operands."""
        binding, avals = self.binding_for(args, kwargs)
        return binding.callee, avals

    def binding_for(
        self, args: Any, kwargs: Any, known: Known | None = None
    ) -> tuple[Binding, Avals]:
        """Return what calls with such arguments bind, and the avals of their operands.

        ``known`` has values of operands that look like this.
        """
        call, operands = self._flatten_arguments(args, kwargs)
        avals = tuple(checks.leaf_aval(x) for x in operands)
        key = (call, avals, x64_enabled(), None)
        if key not in self._bindings:
            numbers, known = [False] * len(avals), known or Known()
            self._bindings[key] = self._planner.plan(call.arguments, avals, numbers, known=known)
        return self._bindings[key], avals

    # --- arguments -------------------------------------------------------------------------------

    def _flatten(self, args: Any, kwargs: Any) -> tuple[_Call, list[Any]]:
        """Split a call's arguments into its structure and its operands."""
        key = []
        if self._options.stochastic:
            kwargs = dict(kwargs)
            key = [self._key(kwargs.pop("rng", None))]
        call, operands = self._flatten_arguments(args, kwargs)
        return call, [*operands, *key]

    def _key(self, rng: Any) -> Any:
        if rng is None:
            raise SignatureError(
                f"{self._label} is wrapped with stochastic=True: pass a JAX key as rng=."
            )
        if not (hasattr(rng, "dtype") and hasattr(rng, "shape")):
            raise SignatureError(
                f"rng of {self._label} is a {type(rng).__name__}; pass a key such as "
                "jax.random.key(0)."
            )
        return rng

    def _flatten_arguments(self, args: Any, kwargs: Any) -> tuple[_Call, list[Any]]:
        given = (args, kwargs)
        if not self._plain:
            given = mark_static(self._options, args, kwargs, self._static)
        try:
            leaves, treedef = tree_flatten(given)
        except (TypeError, ValueError) as error:  # a dict may have keys that cannot be sorted
            raise SignatureError(f"an argument of {self._label} is no tree: {error}") from None
        if any(isinstance(x, _NOT_OPERANDS) for x in leaves):
            return self._flatten_statics(given)
        key = (treedef, ())
        call = self._calls.get(key)
        if call is None:
            self._check_structure(treedef, args, kwargs)
            call = self._intern(key)
            if (
                self._plain
                and not (kwargs or self._options.stochastic)
                and jax.tree_util.all_leaves(args)
            ):
                self._positional[len(args)] = call.jitted
        return call, leaves

    def _flatten_statics(self, given: Any) -> tuple[_Call, list[Any]]:
        operands: list[Any] = []
        statics: list[tuple[int, Static]] = []
        paths, treedef = tree_flatten_with_path(given)
        for i, (path, x) in enumerate(paths):
            where = checks.argument_label(path)
            if isinstance(x, torch.Tensor):
                raise SignatureError(
                    f"{where} of {self._label} is a torch.Tensor; the wrapped function takes JAX "
                    "arrays: pass torch2jax.t2j(tensor), which shares its memory."
                )
            if isinstance(x, Static):
                statics.append((i, x))
            elif isinstance(x, checks.STATIC_TYPES):
                statics.append((i, self._static(x, where)))
            else:
                operands.append(x)
        key = (treedef, tuple(statics))
        call = self._calls.get(key)
        if call is None:
            args, kwargs = given
            self._check_structure(treedef, args, kwargs)
            call = self._intern(key)
        return call, operands

    def _check_operands(self, call: _Call, operands: Sequence[Any]) -> None:
        """Raise where JAX does not take an operand."""
        labels = [*call.arguments.labels, "rng"]
        for where, x in zip(labels, operands, strict=False):
            checks.refuse_wide_int(x, f"{where} of {self._label}")
            try:
                if isinstance(x, jax.ShapeDtypeStruct):  # it has a type, and no value
                    raise TypeError
                jax.typeof(x)
            except (TypeError, ValueError):  # a masked array raises the latter
                raise SignatureError(
                    f"{where} of {self._label} is a {type(x).__name__}, which is no JAX value; "
                    "pass an array or a number, or name the argument in static_argnums or "
                    "static_argnames."
                ) from None

    def _check_structure(self, treedef: Any, args: Any, kwargs: Any) -> None:
        given = kwargs if self._options.out_arg is None else {**kwargs, self._options.out_arg: None}
        checks.check_call(self.__wrapped__, args, given, self._label)
        if self._options.examples is not None:
            expected = mark_static(self._options, *self._options.examples, self._static)
            checks.check_structure(treedef, tree_flatten(expected)[1], self._label)

    def _intern(self, key: tuple[Any, tuple[tuple[int, Static], ...]]) -> _Call:
        return self._calls.setdefault(key, _Call(*key, self._trace, self.__name__))

    # --- tracing ---------------------------------------------------------------------------------

    def _trace(self, call: _Call, *operands: Any) -> Any:
        if self._options.out_specs is None:
            return self._trace_here(call, operands)
        given = OperandOptions(
            self.__wrapped__, self._options, call.arguments, self._label
        ).in_specs()
        shards = Shards(self._options, given, operands, call.arguments.labels, self._label)

        def local(*operands: Any) -> Any:
            if self._options.stochastic:
                operands = (*operands[:-1], shards.own_key(operands[-1]))
            return self._trace_here(call, operands, shards)

        return shards.map(local, operands)

    def _trace_here(
        self, call: _Call, operands: tuple[Any, ...], shards: Shards | None = None
    ) -> Any:
        words = None
        if self._options.stochastic:
            words = self._words(operands[-1])
            operands = operands[:-1]
        avals = tuple((x.shape, x.dtype) for x in map(jax.typeof, operands))
        key = (call, avals, x64_enabled(), shards and shards.mesh)
        binding = self._bindings.get(key)
        if binding is None:
            numbers = [x.weak_type and not x.shape for x in map(jax.typeof, operands)]
            known = self._known.now
            if known is not None and shards is not None:
                known = Known()  # the values are those of the whole operands
            binding = self._bindings[key] = self._planner.plan(
                call.arguments, avals, numbers, shards, known
            )
        if words is None and binding.callee.options.rng is not None:
            [words] = call_primitive(self._planner.seed, [], [((2,), "uint32")], orders=None)
            words = varying_everywhere(words)  # each device draws its own
        return self._bind(binding, operands, words)

    def _words(self, rng: Any) -> Any:
        """Return the words of a key, which are uint32 of shape (n,)."""
        if jax.dtypes.issubdtype(rng.dtype, jax.dtypes.prng_key):
            rng = jax.random.key_data(rng)
        if rng.dtype != "uint32" or len(rng.shape) != 1:
            raise SignatureError(
                f"rng of {self._label} is {rng.dtype}[{','.join(map(str, rng.shape))}]; pass one "
                "key, such as jax.random.key(0), and use jax.vmap for several."
            )
        return rng

    def _bind(self, binding: Binding, operands: Sequence[Any], words: Any) -> Any:
        bound = [
            jax.lax.stop_gradient(x) if i in binding.nondiff else x for i, x in enumerate(operands)
        ]
        if words is not None:
            bound.append(words)
        out = call_primitive(binding.callee, bound, binding.results, orders=self._options.depth)
        n = len(binding.result.leaves)
        result = binding.result.treedef.unflatten(out[:n])
        if not self._options.inplace_argnums:
            return result
        return self._options.with_updated(binding.arguments, binding.inplace, result, out[n:])


# The class itself changes, so that calls elsewhere pay nothing.
os.register_at_fork(
    after_in_child=lambda: setattr(TorchFunction, "__call__", _refusals.refuse_forked)
)

_NOT_OPERANDS = (*checks.STATIC_TYPES, Static, torch.Tensor)

_RUNTIME_ERRORS = (jax.errors.JaxRuntimeError, ValueError)
"""XLA's errors arrive as these two types; the latter comes from jit's C++ path."""


_NOT_CAUGHT = (KeyboardInterrupt, SystemExit)
"""These ask the process to end; `except Exception` would swallow a TorchCallError instead."""


def _raise_original(error: Exception, label: str) -> None:
    """Raise our own error, or the user's exception, where an error of XLA carries one."""
    text = str(error)
    found = exceptions.take_exception(text)
    if found is not None:
        message, original = found
        if isinstance(original, _NOT_CAUGHT):
            # With a cause Python does not show the error of XLA.
            raise original from original.__cause__
        raise TorchCallError(message) from original
    # The handler's own checks fail with these. INTERNAL stands for an exception that was dropped,
    # because too many came after it.
    for status in ("INVALID_ARGUMENT: ", "FAILED_PRECONDITION: ", "INTERNAL: "):
        _, ours, message = text.partition(status)
        if ours and message.startswith(label):
            raise TorchCallError(message) from error
