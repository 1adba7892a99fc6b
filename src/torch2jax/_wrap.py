"""The public function: ``torch2jax(fn)`` is a JAX function."""

from __future__ import annotations

import contextlib
import functools
import threading
import types
import warnings
import weakref
from collections.abc import Callable as Function
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import torch
from jax.tree_util import tree_flatten, tree_flatten_with_path
from torch.overrides import resolve_name

from . import _signature as sig
from . import _state
from ._avals import default_device
from ._callable import Callable, Flat, Options
from ._compat import ArrayImpl
from ._convert import dtype_j2t, x64_enabled
from ._depth import call_to_depth
from ._errors import (
    SignatureError,
    Torch2JaxError,
    Torch2JaxWarning,
    TorchCallError,
    UnsupportedDtypeError,
)
from ._flat import (
    Arguments,
    Result,
    Static,
    describe_result,
    flat_function,
    out_function,
    with_buffers,
)
from ._infer import FakeSurvived, Inference, ShapeDependsOnValues, Spec, infer
from ._options import Config, Operands, mark_static
from ._primitive import call as call_primitive
from ._random import draw_seed, refusing, seeded
from ._replica import Forward
from ._rules.batching import METHODS

_CPU = torch.device("cpu")


def torch2jax(
    fn: Function[..., Any],
    *example_args: Any,
    example_kw: dict[str, Any] | None = None,
    output_shapes: Any = None,
    depth: int | None = None,
    nondiff_argnums: int | Sequence[int] | None = None,
    nondiff_mask: Any = None,
    residuals: str = "tape",
    vmap_method: str = "auto",
    arg_dtypes: Any = None,
    inplace_argnums: int | Sequence[int] = (),
    out_arg: str | None = None,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    stochastic: bool = False,
    side_effects: bool = False,
    lock: contextlib.AbstractContextManager[Any] | bool | None = None,
    name: str | None = None,
    use_torch_vjp: bool | None = None,
    use_zeros: bool | None = None,
) -> TorchFunction:
    """A PyTorch function as a JAX function.

    The result jits, differentiates in both modes to any order, batches and scans like a function
    written in ``jax.numpy``. ``fn`` runs in PyTorch, on tensors that view XLA's memory: operands
    are not copied, results are copied once, into XLA's buffers (none with ``out_arg``).

    Args:
      fn: a function, module or any callable from tensors to tensors. Arguments and results are
        pytrees of any structure; among the arguments bool, str, None, dtypes, devices, slices and
        enums are static by themselves, ints and floats are 0-d operands. It must not change state
        that outlives the call, but see ``inplace_argnums`` and ``side_effects``.
      *example_args: tensors, arrays, ``jax.ShapeDtypeStruct``s, tracers or pytrees of them. They
        fix the structure of the arguments and the dtypes that ``fn`` sees (an int64 example with
        x64 off: ``fn`` gets int64), not shapes: those are read at every trace.
      example_kw: example keyword arguments. Keyword arguments always work, with gradients.
      output_shapes: pytree of ``jax.ShapeDtypeStruct``, arrays, tensors or ``torch.Size``. Given,
        ``fn`` is never evaluated to infer its result, and a result that differs is an error.
      depth: None for derivatives of any order in both modes; ``k >= 1`` for ``k`` nested
        ``jax.custom_vjp`` rules, reverse mode only; 0 for none.
      nondiff_argnums: positional arguments that get zero cotangents without torch work.
      nondiff_mask: the same, as a tree of bools with the structure of the arguments or of a prefix.
      residuals: "tape": a differentiated call keeps PyTorch's autograd graph for its backward pass
        (see ``tape_info``); "recompute": the backward pass runs the forward pass again.
      vmap_method: "auto", "torch", "sequential", "sequential_unrolled", "expand_dims",
        "broadcast_all" or "legacy_vectorized".
      arg_dtypes: torch dtypes in which arguments reach ``fn``: a tree with the structure of the
        arguments or of a prefix (None: as it comes), or a dict by argument name.
      inplace_argnums: arguments that ``fn`` updates in place. The JAX function then returns
        ``(result, updated)``, or ``updated`` alone where ``fn`` returns None; ``updated`` is one
        argument for an int, else a tuple. A donated argument is updated without a copy.
      out_arg: name of the keyword by which ``fn`` takes preallocated results.
      static_argnums: positional arguments passed as Python values, as in ``jax.jit``.
      static_argnames: keyword arguments passed as Python values.
      stochastic: the wrapped function takes ``rng=``, a JAX key, from which PyTorch's generators
        are seeded for that call alone: the same key gives the same numbers, forward and backward,
        in jit, scan and vmap. Without it a function that draws takes its seed from PyTorch's own
        generator at each call, and cannot be used under ``jax.checkpoint``.
      side_effects: the call is never dropped or merged with an equal one.
      lock: a context manager held around every call of ``fn``; True for one shared by the process.
      name: stable name of the call in HLO, profiles, caches and exports; otherwise the qualified
        name of ``fn`` and a counter.
      use_torch_vjp: accepted for compatibility with older bridges, without effect.
      use_zeros: accepted for compatibility with older bridges, without effect.

    Returns:
      A function of JAX arrays. It has ``lower`` and ``trace``, like a jitted one. Wrapping the same
      function with the same options again returns the same object.

    Raises:
      SignatureError: where arguments, results or options do not fit.
      UnsupportedDtypeError: for a dtype that one side does not know.
      DifferentiationError: for a derivative beyond ``depth``.
      TorchCallError: for an exception in ``fn``, from an eager call; its ``__cause__`` is that
        exception. Under your own ``jax.jit`` it is JAX's runtime error with the same text.

    >>> import jax, jax.numpy as jnp, torch
    >>> f = torch2jax(lambda a, b: torch.sin(a) @ b)
    >>> a, b = jnp.ones((2, 3)), jnp.ones((3, 4))
    >>> jax.jit(f)(a, b).shape
    (2, 4)
    >>> jax.grad(lambda a: f(a, b).sum())(a).shape
    (2, 3)
    """
    label = _label(fn)
    if not callable(fn):
        raise SignatureError(f"torch2jax wraps a callable, got {type(fn).__name__}.")
    if residuals not in ("tape", "recompute"):
        raise SignatureError(f'residuals={residuals!r} of {label} is not "tape" or "recompute".')
    if vmap_method not in METHODS:
        raise SignatureError(
            f"vmap_method={vmap_method!r} of {label} is not one of {', '.join(METHODS)}."
        )
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 0):
        raise SignatureError(f"depth={depth!r} of {label} must be None or an int >= 0.")
    static_argnums, static_argnames = sig.resolve_statics(fn, static_argnums, static_argnames)
    config = Config(
        examples=(example_args, example_kw or {}) if example_args or example_kw else None,
        output_shapes=output_shapes,
        depth=depth,
        nondiff_argnums=_indices(nondiff_argnums),
        nondiff_mask=nondiff_mask,
        tape=residuals == "tape",
        vmap_method=vmap_method,
        arg_dtypes=arg_dtypes,
        inplace_argnums=_indices(inplace_argnums),
        inplace_single=isinstance(inplace_argnums, int),
        out_arg=out_arg,
        static_argnums=static_argnums,
        static_argnames=static_argnames,
        stochastic=stochastic,
        side_effects=side_effects,
        lock=_process_lock if lock is True else (lock or None),
        name=name,
        default_dtype=torch.get_default_dtype(),
        default_device=torch.get_default_device(),
    )
    key = (_identity(fn), *config.key())
    with _wrapped_lock:
        wrapped = _wrapped.get(key)
        if wrapped is None:
            wrapped = _wrapped[key] = TorchFunction(fn, label, config)
    return wrapped


def torch2jax_without_vjp(fn: Function[..., Any], *example_args: Any, **options: Any):
    """``torch2jax(fn, ..., depth=0)``: forward only."""
    return torch2jax(fn, *example_args, **{**options, "depth": 0})


def torch2jax_with_vjp(fn: Function[..., Any], *example_args: Any, **options: Any):
    """Deprecated: ``torch2jax`` defines derivatives by itself."""
    warnings.warn(
        "torch2jax_with_vjp is torch2jax: use that name.", DeprecationWarning, stacklevel=2
    )
    return torch2jax(fn, *example_args, **options)


_process_lock = threading.RLock()
_wrapped_lock = threading.Lock()
_wrapped: weakref.WeakValueDictionary[Hashable, TorchFunction] = weakref.WeakValueDictionary()


def _prepared(fn: Function[..., Any], config: Config) -> Function[..., Any]:
    """``fn`` under its lock and the default device of wrap time."""
    contexts: list[Any] = [config.lock] if config.lock is not None else []
    if config.default_device != _CPU:
        contexts.append(config.default_device)
    if not contexts:
        return fn

    def prepared(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return fn(*args, **kwargs)

    return prepared


def _identity(fn: Any) -> Hashable:
    """What makes two functions the same: a bound method is a new object at every access.

    A wrapped function keeps ``fn`` alive, so that an id stays its own.
    """
    if hasattr(fn, "__func__") and hasattr(fn, "__self__"):
        return (id(fn.__self__), id(fn.__func__))
    return id(fn)


def _label(fn: Any) -> str:
    """``fn`` in messages."""
    if isinstance(fn, Forward):
        return type(fn.layout.module).__qualname__
    if isinstance(fn, functools.partial):
        return _label(fn.func)
    if isinstance(fn, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(fn)
    if isinstance(fn, types.BuiltinFunctionType):
        return resolve_name(fn) or fn.__name__
    return getattr(fn, "__qualname__", None) or type(fn).__qualname__


def _qualified_name(fn: Any) -> str:
    """``module.qualname``, the root of the name in HLO."""
    label = _label(fn)
    inner = fn.func if isinstance(fn, functools.partial) else fn
    inner = fn.layout.module if isinstance(fn, Forward) else inner
    if not hasattr(inner, "__qualname__"):
        inner = type(inner)
    module = getattr(inner, "__module__", None)
    return label if module is None or label.startswith(f"{module}.") else f"{module}.{label}"


def _indices(argnums: int | Sequence[int] | None) -> tuple[int, ...]:
    if argnums is None:
        return ()
    return (argnums,) if isinstance(argnums, int) else tuple(argnums)


Avals = Sequence[tuple[tuple[int, ...], Any]]
"""(shape, dtype) pairs."""


@dataclass(frozen=True, eq=False)
class _Call:
    """The structure of a call: what selects a trace beside shapes and dtypes. Interned."""

    treedef: Any
    statics: tuple[tuple[int, Static], ...]


@dataclass(frozen=True)
class _Plan:
    """What a call with given structure, shapes and dtypes binds."""

    callable: Callable
    arguments: Arguments
    result: Result
    results: tuple[tuple[tuple[int, ...], Any], ...]
    inplace: tuple[int, ...]
    nondiff: frozenset[int]


class TorchFunction:
    """A PyTorch function as a JAX function; made by ``torch2jax``."""

    def __init__(self, fn: Function[..., Any], label: str, config: Config) -> None:
        self.__wrapped__ = fn
        self.__name__ = getattr(fn, "__name__", None) or type(fn).__name__
        self.__qualname__ = label
        self.__doc__ = fn.__doc__
        self.__module__ = getattr(fn, "__module__", None) or type(fn).__module__
        self._fn = _prepared(fn, config)
        self._config = config
        self._label = label
        self._plans: dict[Hashable, _Plan] = {}
        self._callables: dict[Hashable, Callable] = {}
        self._calls: dict[Hashable, _Call] = {}
        self._positional: dict[int, _Call] = {}
        self._plain = not (config.static_argnums or config.static_argnames)

        # A function of its own, so that it and not the class names the call in profiles.
        def traced(call: _Call, *operands: Any) -> Any:
            return self._trace(call, *operands)

        traced.__name__ = self.__name__
        traced.__qualname__ = label
        self._jitted = jax.jit(traced, static_argnums=0, inline=True)

    def __repr__(self) -> str:
        return f"torch2jax({self._label})"

    @functools.cached_property
    def _options(self) -> Options:
        # Made at the first trace: asking for the default device starts JAX's backend.
        fn, config = self.__wrapped__, self._config
        return Options(
            label=self._label,
            name=config.name or _qualified_name(fn),
            named=config.name is not None,
            default_dtype=config.default_dtype,
            device=default_device(),
            roots=(fn,),
            vmap_method=config.vmap_method,
            tape=config.tape,
            side_effects=config.side_effects,
            borrows=isinstance(fn, Forward),
        )

    @functools.cached_property
    def _seed(self) -> Callable:
        """What draws without a key draws a seed, and is then a function of that seed."""
        options = replace(self._options, draws=True)
        return Callable(Flat(draw_seed, None, False, ()), options, [], ["the seed"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # The quick path to jit's own: arrays by position, in a number met before.
        call = None
        if not kwargs:
            for a in args:
                if type(a) is not ArrayImpl:
                    break
            else:
                call = self._positional.get(len(args))
        if call is None:
            call, operands = self._flatten(args, kwargs)
        else:
            operands = args
        try:
            return self._jitted(call, *operands)
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # the latter from jit's C++ path
            _raise_original(error, self._label)
            raise
        except TypeError:
            self._check_operands(call, operands)
            raise

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """``jax.stages.Lowered`` for these arguments; ``jax.ShapeDtypeStruct``s do."""
        call, operands = self._flatten(args, kwargs)
        return self._jitted.lower(call, *operands)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """``jax.stages.Traced`` for these arguments; ``jax.ShapeDtypeStruct``s do."""
        call, operands = self._flatten(args, kwargs)
        return self._jitted.trace(call, *operands)

    # --- arguments -------------------------------------------------------------------------------

    def _flatten(self, args: Any, kwargs: Any) -> tuple[_Call, list[Any]]:
        """Split a call's arguments into its structure and its operands."""
        key = []
        if self._config.stochastic:
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
            given = mark_static(self._config, args, kwargs, self._label)
        leaves, treedef = tree_flatten(given)
        if any(isinstance(x, _NOT_OPERANDS) for x in leaves):
            return self._flatten_statics(given)
        key = (treedef, ())
        call = self._calls.get(key)
        if call is None:
            self._check_structure(treedef, args, kwargs)
            call = self._calls[key] = _Call(treedef, ())
            if (
                self._plain
                and not (kwargs or self._config.stochastic)
                and jax.tree_util.all_leaves(args)
            ):
                self._positional[len(args)] = call
        return call, leaves

    def _flatten_statics(self, given: Any) -> tuple[_Call, list[Any]]:
        operands: list[Any] = []
        statics: list[tuple[int, Static]] = []
        paths, treedef = tree_flatten_with_path(given)
        for i, (path, x) in enumerate(paths):
            where = sig.argument_label(path)
            if isinstance(x, torch.Tensor):
                raise SignatureError(
                    f"{where} of {self._label} is a torch.Tensor; the wrapped function takes JAX "
                    "arrays: pass torch2jax.t2j(tensor), which shares its memory."
                )
            if isinstance(x, Static):
                statics.append((i, x))
            elif isinstance(x, sig.STATIC_TYPES):
                statics.append((i, Static(x, where, self._label)))
            else:
                operands.append(x)
        key = (treedef, tuple(statics))
        call = self._calls.get(key)
        if call is None:
            args, kwargs = given
            self._check_structure(treedef, args, kwargs)
            call = self._calls[key] = _Call(*key)
        return call, operands

    def _check_operands(self, call: _Call, operands: Sequence[Any]) -> None:
        """Raise where an operand is nothing that JAX takes."""
        labels = [*self._arguments(call).labels, "rng"]
        for where, x in zip(labels, operands, strict=False):
            try:
                jax.typeof(x)
            except TypeError:
                raise SignatureError(
                    f"{where} of {self._label} is a {type(x).__name__}, which is no JAX value; "
                    "pass an array or a number, or name the argument in static_argnums or "
                    "static_argnames."
                ) from None

    def _check_structure(self, treedef: Any, args: Any, kwargs: Any) -> None:
        given = kwargs if self._config.out_arg is None else {**kwargs, self._config.out_arg: None}
        sig.check_call(self.__wrapped__, args, given, self._label)
        if self._config.examples is not None:
            expected = mark_static(self._config, *self._config.examples, self._label)
            sig.check_structure(treedef, tree_flatten(expected)[1], self._label)

    # --- tracing ---------------------------------------------------------------------------------

    def _trace(self, call: _Call, *operands: Any) -> Any:
        words = None
        if self._config.stochastic:
            *operands, rng = operands
            words = self._words(rng)
        avals = tuple((x.shape, x.dtype) for x in map(jax.typeof, operands))
        key = (call, avals, x64_enabled())
        plan = self._plans.get(key)
        if plan is None:
            numbers = [x.weak_type and not x.shape for x in map(jax.typeof, operands)]
            plan = self._plans[key] = self._plan(call, avals, numbers)
        if words is None and plan.callable.options.rng is not None:
            [words] = call_primitive(self._seed, [], [((2,), "uint32")])
        return self._bind(plan, operands, words)

    def _words(self, rng: Any) -> Any:
        """The words of a key: uint32 of shape (n,)."""
        if jax.dtypes.issubdtype(rng.dtype, jax.dtypes.prng_key):
            rng = jax.random.key_data(rng)
        if rng.dtype != "uint32" or len(rng.shape) != 1:
            raise SignatureError(
                f"rng of {self._label} is {rng.dtype}[{','.join(map(str, rng.shape))}]; pass one "
                "key, such as jax.random.key(0), and use jax.vmap for several."
            )
        return rng

    def _bind(self, plan: _Plan, operands: Sequence[Any], words: Any) -> Any:
        held = [
            jax.lax.stop_gradient(x) if i in plan.nondiff else x for i, x in enumerate(operands)
        ]
        if words is not None:
            held.append(words)
        if self._config.depth is None:
            out = call_primitive(plan.callable, held, plan.results)
        else:
            depth = self._config.depth
            out = call_to_depth(plan.callable, held, plan.results, depth, plan.nondiff)
        n = len(plan.result.leaves)
        result = plan.result.treedef.unflatten(out[:n])
        if not self._config.inplace_argnums:
            return result
        return self._with_updated(plan, result, out[n:])

    def _plan(self, call: _Call, avals: Avals, numbers: Sequence[bool]) -> _Plan:
        arguments = self._arguments(call)
        self._check_avals(arguments, avals)
        facts = Operands(self.__wrapped__, self._config, arguments, self._label)
        arguments = replace(arguments, casts=facts.casts([d for _, d in avals]))
        inplace = facts.of_argnums(self._config.inplace_argnums, "inplace_argnums")
        inference = None
        if self._config.output_shapes is not None:
            dtypes = [d for _, d in avals]
            result = sig.declared_result(self._config.output_shapes, dtypes, self._label)
        else:
            arguments, inference = self._infer(arguments, facts, avals, numbers, bool(inplace))
            result = inference.result
            copies = tuple(sorted(inference.mutated - set(inplace)))
            if copies:
                self._note_copies(arguments, copies)
                arguments = replace(arguments, copies=copies)
        updated = [avals[i] for i in inplace]
        return _Plan(
            self._callable(arguments, result, inplace, inference),
            arguments,
            result,
            (*((leaf.shape, leaf.dtype) for leaf in result.leaves), *updated),
            inplace,
            facts.nondiff(arguments.labels),
        )

    def _arguments(self, call: _Call) -> Arguments:
        n = call.treedef.num_leaves
        static = {i for i, _ in call.statics}
        paths, _ = tree_flatten_with_path(call.treedef.unflatten([0] * n))
        labels = tuple(sig.argument_label(p) for i, (p, _) in enumerate(paths) if i not in static)
        return Arguments(call.treedef, call.statics, labels)

    def _check_avals(self, arguments: Arguments, avals: Avals) -> None:
        for label, (shape, dtype) in zip(arguments.labels, avals, strict=True):
            if not all(isinstance(d, int) for d in shape):
                raise SignatureError(
                    f"{label} of {self._label} has the symbolic shape {shape}; PyTorch needs "
                    "numbers: trace or export it with concrete shapes."
                )
            try:
                dtype_j2t(dtype)
            except UnsupportedDtypeError as error:
                raise UnsupportedDtypeError(f"{label} of {self._label}: {error}") from None

    def _infer(
        self,
        arguments: Arguments,
        facts: Operands,
        avals: Avals,
        numbers: Sequence[bool],
        none_allowed: bool,
    ) -> tuple[Arguments, Inference]:
        """What ``fn`` returns for these avals, and the arguments with the casts that it needs."""
        device = self._options.device

        def attempt(arguments: Arguments) -> Inference:
            specs = [
                Spec(shape, dtype_j2t(dtype), device, facts.example_value(i, shape))
                for i, (shape, dtype) in enumerate(avals)
            ]
            call = arguments.applied(self._fn)
            with jax.ensure_compile_time_eval():  # fn may call JAX: its values are no tracers here
                return infer(
                    lambda *operands: call(*arguments.prepare(operands)),
                    specs,
                    lambda out: describe_result(
                        out, self._label, none_allowed or self._config.side_effects
                    ),
                    self._config.default_dtype,
                    self._options.roots,
                )

        def attempt_wide() -> tuple[Arguments, Inference] | None:
            cast = {i for i, _ in arguments.casts}
            widened = tuple(
                (i, torch.int64)
                for i, (_, dtype) in enumerate(avals)
                if dtype_j2t(dtype) is torch.int32 and i not in cast
            )
            if not widened or x64_enabled():
                return None
            wide = replace(arguments, casts=tuple(sorted(arguments.casts + widened)))
            try:
                inference = attempt(wide)
            except Exception:
                return None
            self._note_wide([arguments.labels[i] for i, _ in widened])
            return wide, inference

        try:
            inference = attempt(arguments)
            if inference.refuses_int32 is not None:
                return attempt_wide() or (arguments, inference)
            return arguments, inference
        except FakeSurvived:
            raise Torch2JaxError(
                f"{self._label} keeps a tensor of the run that infers its result somewhere outside "
                "its modules (a cache, a global, an attribute of another object), so its next call "
                "would compute garbage. To go on, empty that cache and pass output_shapes=, which "
                "needs no such run, or remove the cache."
            ) from None
        except ShapeDependsOnValues:
            raise SignatureError(
                f"the shape of {self._label}'s result depends on the values of its arguments, and "
                "XLA must know shapes when it compiles. Return a result of fixed size (a mask, or "
                "padded), or pass output_shapes= if the size is known."
            ) from None
        except Torch2JaxError:
            raise
        except Exception as error:
            wide = attempt_wide()
            if wide is None:
                raise self._trace_error(error, arguments, avals, numbers) from error
            return wide

    def _trace_error(
        self, error: Exception, arguments: Arguments, avals: Avals, numbers: Sequence[bool]
    ) -> TorchCallError:
        scalars = [label for label, n in zip(arguments.labels, numbers, strict=True) if n]
        hint = (
            f"\n(ints and floats reach it as 0-d tensors, here {', '.join(scalars)}: name them in "
            "static_argnums or static_argnames if it needs Python numbers)"
            if scalars
            else ""
        )
        operands = ", ".join(
            f"{label}: {dtype}[{','.join(map(str, shape))}]"
            for label, (shape, dtype) in zip(arguments.labels, avals, strict=True)
        )
        return TorchCallError(
            f"{self._label} raised {type(error).__name__} when it was traced for ({operands}): "
            + "\n".join([f"{error}{hint}", *getattr(error, "__notes__", ())])
        )

    def _note_copies(self, arguments: Arguments, copies: Sequence[int]) -> None:
        names = ", ".join(arguments.labels[i] for i in copies)
        self._note(
            ("copies", names),
            f"{self._label} changes {names} in place; JAX arrays are immutable, so it gets a "
            "private copy at each call. Name the argument in inplace_argnums to receive its "
            "updated value without a copy, or clone it yourself.",
        )

    def _note_wide(self, labels: Sequence[str]) -> None:
        names = ", ".join(labels)
        self._note(
            ("wide", names),
            f"{self._label} refuses int32, so {names} reach it as int64 (JAX's x64 mode is off). "
            "arg_dtypes= or int64 examples say so without this note.",
        )

    def _note(self, key: Hashable, text: str) -> None:
        if key not in self._options.notes:
            self._options.notes.add(key)
            warnings.warn(text, Torch2JaxWarning, stacklevel=4)

    def _callable(
        self,
        arguments: Arguments,
        result: Result,
        inplace: tuple[int, ...],
        inference: Inference | None,
    ) -> Callable:
        """One callable for each way in which flat operands become a flat result."""
        forms = tuple((leaf.torch_dtype, leaf.dtype) for leaf in result.leaves)
        key = (arguments, result.treedef, forms, x64_enabled())
        known = self._callables.get(key)
        if known is not None:
            return known
        fn = self._fn
        out_arg = self._config.out_arg
        if out_arg is not None and sig.requires(self.__wrapped__, out_arg):
            fn = with_buffers(fn, out_arg, result)
        pure, run = flat_function(fn, arguments, result, self._label, inplace)
        options = replace(self._options, mutated=tuple(sorted({*inplace, *arguments.copies})))
        inputs = list(arguments.labels)
        outputs = [leaf.label for leaf in result.leaves]
        if inplace:
            n = len(outputs)
            aliases = tuple((i, n + k) for k, i in enumerate(inplace))
            options = replace(options, aliases=aliases)
            outputs += [f"the updated {arguments.labels[i]}" for i in inplace]
        elif out_arg is not None:
            run = out_function(self._fn, arguments, result, out_arg, self._label)
            options = replace(options, pass_outputs=True)
        draws = inference.draws if inference is not None else None
        if draws and isinstance(self.__wrapped__, Forward) and self.__wrapped__.refuses_draws:
            raise SignatureError(
                f"{self._label} draws random numbers ({draws}): pass a JAX key as rng=."
            )
        if self._config.stochastic or draws:
            rng = len(inputs)
            inputs.append("rng")
            options = replace(options, rng=rng)
            pure, run = seeded(pure, rng), seeded(run, rng) if run else None
        elif inference is None:
            run, pure = run or pure, refusing(pure, self._label)
        forward_ad = inference is not None and inference.forward_ad
        program = Flat(pure, run, forward_ad, options.roots)
        return self._callables.setdefault(key, Callable(program, options, inputs, outputs))

    def _with_updated(self, plan: _Plan, result: Any, updated: Sequence[Any]) -> Any:
        """``(result, updated arguments)``, in the structure of the arguments."""
        by_leaf = dict(zip(plan.inplace, updated, strict=True))
        leaves = [by_leaf.get(i) for i in range(len(plan.arguments.labels))]
        args, _ = plan.arguments.unflatten(leaves)
        chosen = tuple(args[i] for i in self._config.inplace_argnums)
        values = chosen[0] if self._config.inplace_single else chosen
        return values if result is None else (result, values)


_NOT_OPERANDS = (*sig.STATIC_TYPES, Static, torch.Tensor)


def _raise_original(error: Exception, label: str) -> None:
    """Raise what the user should meet in place of an error of XLA that carries one of ours."""
    text = str(error)
    found = _state.take_exception(text)
    if found is not None:
        message, original = found
        raise TorchCallError(message) from original
    for status in ("INVALID_ARGUMENT: ", "FAILED_PRECONDITION: "):  # the handler's own checks
        _, ours, message = text.partition(status)
        if ours and message.startswith(label):
            raise TorchCallError(message) from error
