"""``torch2jax(fn)``, the public function, is a JAX function."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
import torch

from ._bridge.calls import checks
from ._bridge.calls.function import TorchFunction
from ._bridge.calls.names import label_of
from ._bridge.calls.options import Options
from ._bridge.jax_side.batching import METHODS, VmapMethod
from ._bridge.jax_side.exporting import provide
from ._bridge.wrapping import process_lock, wrapped
from ._compat.torch import check_compiles
from ._errors import SignatureError
from ._jax2torch.function import JaxFunction


def torch2jax(
    fn: Callable[..., Any],
    *example_args: Any,
    example_kw: dict[str, Any] | None = None,
    output_shapes: Any = None,
    depth: int | None = None,
    nondiff_argnums: int | Sequence[int] | None = None,
    nondiff_mask: Any = None,
    residuals: Literal["tape", "recompute"] = "tape",
    vmap_method: VmapMethod = "auto",
    arg_dtypes: Any = None,
    inplace_argnums: int | Sequence[int] = (),
    out_arg: str | None = None,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    stochastic: bool = False,
    side_effects: bool = False,
    lock: contextlib.AbstractContextManager[Any] | bool | None = None,
    in_specs: Any = None,
    out_specs: Any = None,
    mesh: Any = None,
    output_sharding_spec: Any = None,
    lower: bool | Literal["strict"] = False,
    compiled: bool = False,
    name: str | None = None,
    use_torch_vjp: bool | None = None,
    use_zeros: bool | None = None,
) -> TorchFunction:
    """Make a JAX function of a PyTorch function.

    The result jits, differentiates in both modes to any order, batches and scans like a function
    written in ``jax.numpy``. ``fn`` runs in PyTorch, on tensors that view XLA's memory: operands
    are not copied, and results are copied once, into XLA's buffers (with ``out_arg`` not at all).

    Args:
      fn: a function, module or any callable from tensors to tensors. Arguments and results are
        pytrees of any structure; among the arguments bool, str, None, dtypes, devices, slices and
        enums are static by themselves, and ints and floats are 0-d operands. ``fn`` must not change
        state that outlives the call, but see ``inplace_argnums`` and ``side_effects``.
      *example_args: tensors, arrays, ``jax.ShapeDtypeStruct``s, tracers or pytrees of them. They
        fix the structure of the arguments and the dtypes that ``fn`` sees (with x64 off
        ``fn`` gets int64 for an int64 example). Shapes are read at every trace instead.
      example_kw: example keyword arguments. Keyword arguments always work, with gradients.
      output_shapes: pytree of ``jax.ShapeDtypeStruct``, arrays, tensors or ``torch.Size``. Where
        it is given, ``fn`` is never evaluated to infer its result, and a result that differs is an
        error; a list and a tuple count as equal.
      depth: None for derivatives of any order; ``k >= 1`` for ``k`` orders at most, in both modes;
        0 for none.
      nondiff_argnums: positional arguments that get zero cotangents without torch work.
      nondiff_mask: the same, as a tree of bools with the structure of the arguments or of a prefix.
      residuals: with "tape" a differentiated call keeps PyTorch's autograd graph for its backward
        pass (see ``tape_info``); with "recompute" the backward pass runs the forward pass again.
      vmap_method: "auto", "torch", "sequential", "sequential_unrolled", "expand_dims",
        "broadcast_all" or "legacy_vectorized".
      arg_dtypes: torch dtypes in which arguments reach ``fn``: a tree with the structure of the
        arguments or of a prefix (None leaves an argument as it comes), or a dict by argument name.
      inplace_argnums: arguments that ``fn`` updates in place. The JAX function then returns
        ``(result, updated)``, or ``updated`` alone where ``fn`` returns None; ``updated`` is one
        argument for an int, else a tuple. A donated argument is updated without a copy.
      out_arg: name of the keyword by which ``fn`` takes preallocated results.
      static_argnums: positional arguments passed as Python values, as in ``jax.jit``.
      static_argnames: keyword arguments passed as Python values.
      stochastic: the wrapped function takes ``rng=``, a JAX key, from which PyTorch's generators
        are seeded for that call alone: the same key gives the same numbers, forward and backward,
        in jit, scan and vmap. Without it a function that draws takes its seed from PyTorch's own
        generator at each call, and it cannot be used under ``jax.checkpoint``.
      side_effects: the call is never dropped or merged with an equal one.
      lock: a context manager held around every call of ``fn``; True for one shared by the process.
      in_specs: how arguments are sharded, for ``out_specs``: ``jax.P``s, a tree with the structure
        of the arguments or of a prefix, or a dict by argument name. None says that their types tell
        (mesh axes that are explicit).
      out_specs: how the result is sharded, as in ``jax.shard_map``: ``fn`` runs on every shard of
        its arguments, and nothing is gathered. ``output_shapes`` are those of the whole result.
        Without it, call the function inside ``jax.shard_map``, or on arguments that are whole.
      mesh: the mesh of the specs; None stands for that of the arguments' types, or of
        ``jax.set_mesh``.
      output_sharding_spec: deprecated name of ``out_specs``.
      lower: ``fn`` becomes a JAX program, operator by operator, instead of running in PyTorch. That
        is plain JAX, compiled by XLA for any hardware, with JAX's own derivatives.
        ``lowering_report`` says what becomes of each operator; one without a lowering goes through
        the bridge, and so does the innermost module that asks for values (``nonzero``, ``.item()``,
        ``if x.any()``). With "strict" both are errors. Tensors that ``fn`` closes over are
        constants. Options that only concern the bridge have no effect.
      compiled: PyTorch compiles ``fn``, its derivatives and batches ahead of time into libraries,
        which XLA calls without Python and without its lock. They are kept on disk. Needs PyTorch
        2.10 or later and a C++ compiler. ``fn`` is traced once for each set of shapes: it must not
        ask for values, change tensors that it closes over (they are constants), or draw without
        ``stochastic=True``.
      name: stable name of the call in HLO, profiles, caches and exports; by default it is the
        qualified name of ``fn`` and a counter.
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
        ``KeyboardInterrupt`` and ``SystemExit`` leave an eager call as themselves.

    Examples:
      >>> import jax, jax.numpy as jnp, torch
      >>> f = torch2jax(lambda a, b: torch.sin(a) @ b)
      >>> a, b = jnp.ones((2, 3)), jnp.ones((3, 4))
      >>> jax.jit(f)(a, b).shape
      (2, 4)
      >>> jax.grad(lambda a: f(a, b).sum())(a).shape
      (2, 3)
    """
    label = label_of(fn)
    if not callable(fn):
        raise SignatureError(f"torch2jax wraps a callable, got {type(fn).__name__}.")
    if residuals not in ("tape", "recompute"):
        raise SignatureError(f'residuals={residuals!r} of {label} is not "tape" or "recompute".')
    if vmap_method not in METHODS:
        raise SignatureError(
            f"vmap_method={vmap_method!r} of {label} is not one of {', '.join(METHODS)}."
        )
    if not isinstance(lower, bool) and lower != "strict":
        raise SignatureError(f'lower={lower!r} of {label} is not True, False or "strict".')
    if compiled and (lower or side_effects or out_arg is not None):
        other = "lower" if lower else "side_effects" if side_effects else "out_arg"
        raise SignatureError(
            f"compiled=True and {other}= of {label} exclude each other: a compiled call runs no "
            "Python, and writes its results into XLA's buffers by itself."
        )
    if compiled:
        check_compiles()
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 0):
        raise SignatureError(f"depth={depth!r} of {label} must be None or an int >= 0.")
    if output_sharding_spec is not None:
        warnings.warn("output_sharding_spec is now out_specs.", DeprecationWarning, stacklevel=2)
        out_specs = output_sharding_spec if out_specs is None else out_specs
    if out_specs is None and (in_specs is not None or mesh is not None):
        raise SignatureError(
            f"in_specs and mesh of {label} go with out_specs, which says how the result is sharded."
        )
    if example_kw is not None and not isinstance(example_kw, dict):
        raise SignatureError(f"example_kw of {label} must be a dict, got {example_kw!r}.")
    if lock is not None and not (isinstance(lock, bool) or hasattr(type(lock), "__exit__")):
        raise SignatureError(f"lock={lock!r} of {label} must be a context manager or a bool.")
    static_argnums, static_argnames = checks.resolve_statics(
        fn, static_argnums, static_argnames, label
    )
    options = Options(
        examples=(example_args, example_kw or {}) if example_args or example_kw else None,
        output_shapes=output_shapes,
        depth=depth,
        nondiff_argnums=checks.indices(nondiff_argnums, "nondiff_argnums", label),
        nondiff_mask=nondiff_mask,
        tape=residuals == "tape",
        vmap_method=vmap_method,
        arg_dtypes=arg_dtypes,
        inplace_argnums=checks.indices(inplace_argnums, "inplace_argnums", label),
        inplace_single=isinstance(inplace_argnums, int | np.integer),
        out_arg=checks.one_name(out_arg, "out_arg", label),
        static_argnums=static_argnums,
        static_argnames=static_argnames,
        stochastic=stochastic,
        compiled=compiled,
        strict=lower == "strict",
        side_effects=side_effects,
        lock=process_lock if lock is True else (lock or None),
        in_specs=in_specs,
        out_specs=out_specs,
        mesh=mesh,
        name=checks.one_name(name, "name", label),
        default_dtype=torch.get_default_dtype(),
        default_device=torch.get_default_device(),
    )
    if isinstance(fn, JaxFunction) and fn.is_plain() and options.changes_nothing():
        return fn.__wrapped__  # type: ignore[return-value]  # it is the JAX function that it was
    if not lower:
        return wrapped(TorchFunction, fn, label, options)
    from ._lower.function import LoweredFunction  # the bridge does not need it

    return wrapped(LoweredFunction, fn, label, options)


def register(
    fn: Callable[..., Any], *example_args: Any, name: str, **options: Any
) -> TorchFunction:
    """Provide a function for exported programs that this process loads.

    Args:
      fn: the function, as it was wrapped where the program was exported.
      *example_args: arrays, tensors or ``jax.ShapeDtypeStruct``s: the arguments' structure, shapes
        and dtypes. Register once for each signature that the program calls.
      name: the ``name=`` under which it was wrapped there.
      **options: the other options of ``torch2jax`` with which it was wrapped there; keyword
        arguments go into ``example_kw``.

    Returns:
      The wrapped function.

    Raises:
      SignatureError: where another function has the name in this process, or for an ``fn`` that
        does not take such arguments.

    >>> import jax, jax.numpy as jnp, torch
    >>> from torch2jax import export_checks
    >>> double = lambda x: 2 * x
    >>> f = torch2jax(double, name="double")
    >>> exported = jax.export.export(jax.jit(f), disabled_checks=export_checks)(jnp.ones(3))
    >>> _ = register(double, jnp.ones(3), name="double")
    >>> exported.call(jnp.ones(3))
    Array([2., 2., 2.], dtype=float32)
    """
    keywords = options.pop("example_kw", None) or {}
    function = torch2jax(fn, name=name, **options)
    args, keywords = jax.tree.map(_struct, (example_args, keywords))
    provide(name, function, *function.callee_for(args, keywords))
    return function


def _struct(x: Any) -> Any:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return jax.ShapeDtypeStruct(*checks.leaf_aval(x))
    return x


def torch2jax_without_vjp(
    fn: Callable[..., Any], *example_args: Any, **options: Any
) -> TorchFunction:
    """Return ``torch2jax(fn, ..., depth=0)``, which runs forward only.

    Examples:
      >>> import jax.numpy as jnp, torch
      >>> torch2jax_without_vjp(torch.square)(jnp.arange(3.0))
      Array([0., 1., 4.], dtype=float32)
    """
    return torch2jax(fn, *example_args, **{**options, "depth": 0})


def torch2jax_with_vjp(fn: Callable[..., Any], *example_args: Any, **options: Any) -> TorchFunction:
    """Use ``torch2jax``, which defines derivatives by itself; this name is deprecated.

    Examples:
      >>> import torch
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("ignore")
      ...     torch2jax_with_vjp(torch.square) is torch2jax(torch.square)
      True
    """
    warnings.warn(
        "torch2jax_with_vjp is torch2jax: use that name.", DeprecationWarning, stacklevel=2
    )
    return torch2jax(fn, *example_args, **options)
