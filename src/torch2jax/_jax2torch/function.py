"""``jax2torch(fn)`` is a PyTorch function, in the other direction than ``torch2jax``."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten, tree_flatten_with_path

from .._bridge.calls import checks
from .._bridge.calls.arguments import Static, mark_static
from .._bridge.calls.function import TorchFunction
from .._bridge.calls.names import label_of
from .._compat.jax import local_device
from .._compat.torch import dispatch_modes
from .._conversions.convert import needed_cpu
from .._conversions.dtypes import dtype_j2t
from .._conversions.refusals import GPU
from .._errors import SignatureError, Torch2JaxError, UnsupportedDtypeError
from .autograd import apply
from .graph_sites import named
from .programs import Function, JaxProgram

Applier = Callable[[Any, Sequence[Any]], tuple[Sequence[torch.Tensor], Any]]

_counter = itertools.count()

_NUMBERS = (bool, int, float, complex, np.ndarray, np.generic)


class _Entry:
    """An entry serves calls with one structure of arguments and one set of static ones."""

    def __init__(self, treedef: Any, statics: dict[int, Static], function: JaxFunction) -> None:
        spots = [s for s in range(treedef.num_leaves) if s not in statics]
        marked = treedef.unflatten(range(treedef.num_leaves))
        paths = [path for path, _ in tree_flatten_with_path(marked)[0]]
        self.labels = [checks.argument_label(paths[s]) for s in spots]
        args, _ = marked
        for i in function.nondiff_argnums:
            checks.check_position(i, len(args), "nondiff_argnums", function.__qualname__)
        held = [set(jax.tree.leaves(args[i])) for i in function.nondiff_argnums]
        self.nondiff = [k for k, s in enumerate(spots) if any(s in leaves for leaves in held)]
        fn, label = function.__wrapped__, function.__qualname__

        def call(*operands: Any) -> Any:
            leaves: list[Any] = [None] * treedef.num_leaves
            for s, static in statics.items():
                leaves[s] = static.value
            for s, x in zip(spots, operands, strict=True):
                leaves[s] = x
            args, kwargs = treedef.unflatten(leaves)
            return fn(*args, **kwargs)

        check = functools.partial(_checked, label=label)
        self.program = JaxProgram(Function(call, check, function.name))


class JaxFunction:
    """A ``JaxFunction`` is a JAX function as a PyTorch function; ``jax2torch`` makes it."""

    def __init__(
        self,
        fn: Callable[..., Any],
        nondiff_argnums: tuple[int, ...],
        static_argnums: tuple[int, ...],
        static_argnames: tuple[str, ...],
        device: torch.device | None,
        name: str | None,
    ) -> None:
        self.__wrapped__ = fn
        self.__name__ = getattr(fn, "__name__", None) or type(fn).__name__
        self.__qualname__ = label_of(fn)
        self.__doc__ = fn.__doc__
        self.__module__ = getattr(fn, "__module__", None) or type(fn).__module__
        self.nondiff_argnums = nondiff_argnums
        self.static_argnums = static_argnums
        self.static_argnames = static_argnames
        self.device = device
        self.name = name or self.__name__
        self.key = f"{self.__qualname__}/{next(_counter)}"
        named[self.key] = self
        self._plain = not (static_argnums or static_argnames)
        self._entries: dict[Any, _Entry] = {}

    def is_plain(self) -> bool:
        """Return whether its arguments and derivatives are those of the function itself."""
        return self._plain and not self.nondiff_argnums and self.device is None

    def __repr__(self) -> str:
        return f"jax2torch({self.__qualname__})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            from .graph_operator import call_in_graph  # torch.compile imports it as it traces

            return call_in_graph(self.key, args, kwargs)
        if dispatch_modes():  # make_fx and fake tensors see operators alone
            from .graph_operator import apply_in_graph

            return self.call_by(apply_in_graph, args, kwargs)
        return self.call_by(apply, args, kwargs)

    def call_by(self, apply: Applier, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call it; ``apply`` maps a program and its operands to results and their tree."""
        entry, operands = self._flatten(args, kwargs)
        for k in entry.nondiff:
            if isinstance(operands[k], torch.Tensor):
                operands[k] = operands[k].detach()
        try:
            if self.device is None and _has_tensor(operands):
                outs, tree = apply(entry.program, operands)
            else:
                outs, tree = self._apply_on_device(apply, entry, operands)
        except Exception as error:
            self._explain(error, entry, operands)
            raise
        return tree.unflatten(outs)

    def _apply_on_device(self, apply: Applier, entry: _Entry, operands: list[Any]) -> Any:
        """Apply it on the device that the user chose, or else on PyTorch's default one."""
        device = self.device or torch.get_default_device()
        for label, x in zip(entry.labels, operands, strict=True):
            if isinstance(x, torch.Tensor) and not _same_device(x.device, device):
                raise SignatureError(
                    f"{label} of {self.__qualname__} is on {x.device}, and jax2torch was told "
                    f'device="{device}". Move it first: tensor.to("{device}").'
                )
        with jax.default_device(_jax_device(device)):
            return apply(entry.program, operands)

    def __deepcopy__(self, memo: Any) -> JaxFunction:
        return self  # it is a function, without state of its own

    def __reduce__(self) -> Any:
        options = (
            self.nondiff_argnums,
            self.static_argnums,
            self.static_argnames,
            self.device,
            self.name,
        )
        return JaxFunction, (self.__wrapped__, *options)

    def _entry(
        self, key: Any, treedef: Any, statics: dict[int, Static], args: Any, kwargs: Any
    ) -> _Entry:
        checks.check_call(self.__wrapped__, args, kwargs, self.__qualname__)
        return self._entries.setdefault(key, _Entry(treedef, statics, self))

    def _flatten(self, args: Any, kwargs: Any) -> tuple[_Entry, list[Any]]:
        if self._plain:
            leaves, treedef = tree_flatten((args, kwargs))
            entry = self._entries.get(treedef) or self._entry(treedef, treedef, {}, args, kwargs)
            return entry, leaves
        leaves, treedef = tree_flatten(mark_static(self, args, kwargs, self._static))
        statics = {i: x for i, x in enumerate(leaves) if isinstance(x, Static)}
        key = (treedef, tuple(statics.items()))
        entry = self._entries.get(key) or self._entry(key, treedef, statics, args, kwargs)
        return entry, [x for x in leaves if not isinstance(x, Static)]

    def _static(self, value: Any, where: str) -> Static:
        if isinstance(value, torch.Tensor):  # its hash would be that of its identity
            raise SignatureError(
                f"the static argument {where} of {self.__qualname__} is a tensor: it would be "
                "traced anew for each. Tensors are operands; leave it out of static_argnums and "
                "static_argnames."
            )
        return Static(value, where, self.__qualname__)

    def _explain(self, error: Exception, entry: _Entry, operands: Sequence[Any]) -> None:
        """Raise in the user's words where an argument is to blame for ``error``."""
        where = getattr(error, "operand", None)
        if where is not None:
            raise type(error)(f"{entry.labels[where]} of {self.__qualname__}: {error}") from None
        for label, x in zip(entry.labels, operands, strict=True):
            if isinstance(x, Tracer):
                raise SignatureError(
                    f"{label} of {self.__qualname__} is a JAX tracer, {x.aval}: this is a PyTorch "
                    "function now. Inside jax.jit, jax.grad or jax.vmap call the JAX function "
                    "itself."
                ) from error
            if not isinstance(x, (torch.Tensor, jax.Array, *_NUMBERS)):
                raise SignatureError(
                    f"{label} of {self.__qualname__} is a {type(x).__name__}, which is no value "
                    "of JAX; pass a tensor or a number, or name the argument in static_argnums or "
                    "static_argnames."
                ) from error
            checks.refuse_wide_int(x, f"{label} of {self.__qualname__}")
            if isinstance(x, torch.Tensor) and x.is_nested:
                raise SignatureError(
                    f"{label} of {self.__qualname__} is a nested tensor, and JAX arrays are dense. "
                    "Convert it first: tensor.to_padded_tensor(padding)."
                ) from error
        devices = {str(x.device) for x in operands if isinstance(x, torch.Tensor)}
        if len(devices) > 1:
            raise SignatureError(
                f"{self.__qualname__} got tensors on {' and '.join(sorted(devices))}. JAX computes "
                "on one device: move them to one, tensor.to(device)."
            ) from error


def jax2torch(
    fn: Callable[..., Any],
    *,
    nondiff_argnums: int | Sequence[int] | None = None,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    device: torch.device | str | None = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Make a PyTorch function of a JAX function.

    The result runs ``fn`` compiled, on arrays that view the tensors' memory, and returns tensors
    that view JAX's. It is differentiable to any order: ``backward``, ``torch.autograd.grad``,
    forward mode, ``torch.func`` and ``torch.utils.checkpoint`` work as with PyTorch's own
    operators. The forward pass keeps JAX's residuals; the backward pass runs no forward again.

    Args:
      fn: a function that ``jax.jit`` takes: pure, from arrays to arrays. Arguments and results are
        pytrees of any structure, keyword arguments included. A tensor of any shape and strides
        reaches ``fn`` as a traced array of the dtype of the same name, a Python number as a
        weakly typed scalar; NumPy and JAX arrays and None reach it as they are. ``fn`` is traced
        once for each structure, shapes, dtypes and set of arguments that ask for a gradient.
      nondiff_argnums: positional arguments that never get a gradient, as if they were detached.
      static_argnums: positional arguments passed as Python values, as in ``jax.jit``.
      static_argnames: keyword arguments passed as Python values.
      device: where ``fn`` runs. With None it runs where its tensors are, or on PyTorch's default
        device if there are none. A tensor on another device is an error.
      name: name of the computation in HLO and profiles; by default it is that of ``fn``.

    Returns:
      A function of tensors. Its results are new tensors on the arguments' device: each is JAX's
      own buffer, not copied, and may be written to. Floating and complex results have gradients
      where arguments ask for them; integer and bool ones do not. On a CPU they are computed when
      the call returns; on a GPU the streams of JAX and PyTorch are ordered, and no one waits.

      Arguments are copied where ``t2j`` copies: not contiguous, not aligned to 64 bytes, int64
      while x64 is off. ``jax2torch(torch2jax(g))`` is ``g``, and ``torch2jax(jax2torch(f))`` is
      ``f``.

    Raises:
      SignatureError: for arguments or results that are no values of JAX, or on several devices.
      UnsupportedDtypeError: for a dtype that one side does not know; while x64 is off also for
        float64, complex128, uint64, and int64 values that do not fit into int32.
      Torch2JaxError: JAX does not have the device.

    >>> import jax.numpy as jnp, torch
    >>> f = jax2torch(lambda x, scale: {"y": jnp.sin(x) * scale})
    >>> x = torch.zeros(3, requires_grad=True)
    >>> f(x, scale=2.0)["y"].sum().backward()
    >>> x.grad
    tensor([2., 2., 2.])
    >>> torch.func.hessian(lambda x: f(x, 2.0)["y"].sum())(x).shape
    torch.Size([3, 3])
    """
    if not callable(fn):
        raise SignatureError(f"jax2torch wraps a callable, got {type(fn).__name__}.")
    label = label_of(fn)
    nums, names = checks.resolve_statics(fn, static_argnums, static_argnames, label)
    nondiff = checks.indices(nondiff_argnums, "nondiff_argnums", label)
    if isinstance(fn, TorchFunction) and fn.is_plain() and not (nondiff or nums or names):
        return fn.__wrapped__
    try:
        where = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SignatureError(f"device={device!r} of jax2torch is no device: {error}") from None
    return JaxFunction(fn, nondiff, nums, names, where, checks.one_name(name, "name", label))


def _checked(result: Any, label: str) -> Any:
    """Return the result, or raise where no tensor can be made of a leaf."""
    for path, x in tree_flatten_with_path(result)[0]:
        where = f"result{keystr(path)} of {label}"
        if not isinstance(x, (jax.Array, *_NUMBERS)):
            raise SignatureError(
                f"{where} is a {type(x).__name__}, which is no value of JAX; return arrays, "
                "numbers and trees of them."
            )
        try:
            dtype_j2t(jax.numpy.result_type(x))
        except UnsupportedDtypeError as error:
            raise UnsupportedDtypeError(f"{where}: {error}") from None
    return result


def _has_tensor(operands: Sequence[Any]) -> bool:
    for x in operands:  # noqa: SIM110  # any() takes three times as long
        if isinstance(x, torch.Tensor):
            return True
    return False


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (b.index is None or a.index == b.index)


def _jax_device(device: torch.device) -> Any:
    if device.type == "cpu":
        found = needed_cpu("jax2torch is to run")
    else:
        platform = GPU if device.type == "cuda" else device.type
        found = local_device(platform, device.index or 0)
    if found is None:
        here = ", ".join(f"{d.platform}:{d.local_hardware_id}" for d in jax.local_devices())
        raise Torch2JaxError(
            f"JAX has no device {device} here, but {here}: leave device= out, or install the JAX "
            "that knows it."
        )
    return found
