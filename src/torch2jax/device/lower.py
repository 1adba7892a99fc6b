"""``torch2jax(fn, lower=True)``: ``fn`` runs once, on tensors that hold tracers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable as Function
from dataclasses import dataclass
from typing import Any

import jax
import torch

from .. import _lease, _state
from .. import _signature as sig
from .._dtypes import canonical, dtype_j2t, x64_enabled
from .._errors import SignatureError, Torch2JaxError, Torch2JaxWarning
from .._flat import Arguments, flatten_result
from .._function import TorchFunction
from .._options import Config, Operands
from .._replica import Forward, Layout
from .._shards import Shards
from .._torch_compat import DeviceContext
from . import random
from .constants import value_of
from .custom import differentiable_by_jax
from .events import recorded
from .registration import enable
from .state import lowering_scope
from .tensor import Tensor, from_torch, wrap

__all__ = ["LoweredFunction", "Report", "lowering_report"]


class LoweredFunction(TorchFunction):
    """A PyTorch function as a JAX program; made by ``torch2jax(fn, lower=True)``."""

    def __init__(
        self, fn: Function[..., Any], run: Function[..., Any], label: str, config: Config
    ) -> None:
        super().__init__(fn, run, label, config)
        self._run = _on_replica(fn) if isinstance(fn, torch.nn.Module) else run
        self._noted: set[str] = set()
        if config.out_arg is not None:
            raise SignatureError(
                f"out_arg of {label} is for the bridge, where results land in XLA's buffers; "
                "lower=True has no copies to save."
            )
        enable()

    def __repr__(self) -> str:
        return f"torch2jax({self._label}, lower=True)"

    def _trace_here(self, call: Any, operands: Any, shards: Shards | None = None) -> Any:
        key = None
        if self._config.stochastic:
            key, operands = self._words(operands[-1]), operands[:-1]
        facts = Operands(self.__wrapped__, self._config, call.arguments, self._label)
        labels = call.arguments.labels
        held = facts.nondiff(labels)
        arrays = [
            jax.lax.stop_gradient(x) if i in held else jax.numpy.asarray(x)
            for i, x in enumerate(operands)
        ]
        avals = [jax.typeof(x) for x in arrays]
        for label, a in zip(labels, avals, strict=True):
            if not all(isinstance(n, int) for n in a.shape):
                raise SignatureError(
                    f"{label} of {self._label} has the shape {a.shape}: PyTorch code needs sizes "
                    "that are numbers. Export one program for each size."
                )
        casts = dict(facts.casts([a.dtype for a in avals]))
        dtypes = [casts.get(i) or dtype_j2t(a.dtype) for i, a in enumerate(avals)]
        narrow = [i for i, d in enumerate(dtypes) if d is torch.int32 and i not in casts]
        inplace = facts.of_argnums(self._config.inplace_argnums, "inplace_argnums")
        try:
            return self._attempt(call.arguments, arrays, dtypes, key, inplace)
        except Torch2JaxError:
            raise
        except Exception as error:
            # Without x64 PyTorch's int64 comes as int32, which some operators refuse.
            if not narrow or x64_enabled():
                raise
            wide = [torch.int64 if i in narrow else d for i, d in enumerate(dtypes)]
            try:
                out = self._attempt(call.arguments, arrays, wide, key, inplace)
            except Exception:
                raise error from None
            self._note([labels[i] for i in narrow])
            return out

    def _note(self, labels: list[str]) -> None:
        names = ", ".join(labels)
        if names not in self._noted:
            self._noted.add(names)
            warnings.warn(
                f"{self._label} refuses int32, so {names} reach it as int64 (JAX's x64 mode is "
                "off). arg_dtypes= or int64 examples say so without this note.",
                Torch2JaxWarning,
                stacklevel=4,
            )

    def _attempt(
        self,
        arguments: Arguments,
        arrays: list[Any],
        dtypes: list[torch.dtype],
        key: Any,
        inplace: tuple[int, ...],
    ) -> Any:
        tensors = [_argument(x, d) for x, d in zip(arrays, dtypes, strict=True)]
        args, kwargs = arguments.unflatten(tensors)
        with running(self._config.default_dtype, key):
            out = _lease.scoped(lambda: self._run(*args, **kwargs))()
            if inplace and out is None:
                result = None
            else:
                found, treedef = flatten_result(out, self._label)
                self._check_shapes([t for _, t in found], treedef, arrays)
                result = treedef.unflatten([_result(t) for _, t in found])
            updated = [_result(tensors[i]) for i in inplace]
        if not self._config.inplace_argnums:
            return result
        return self._config.with_updated(arguments, inplace, result, updated)

    def _check_shapes(self, found: list[Any], treedef: Any, arrays: list[Any]) -> None:
        if self._config.output_shapes is None:
            return
        dtypes = [x.dtype for x in arrays]
        declared = sig.declared_result(self._config.output_shapes, dtypes, self._label)
        got = [(tuple(t.shape), canonical(t.dtype)) for t in found]
        expected = [(leaf.shape, leaf.dtype) for leaf in declared.leaves]
        if treedef != declared.treedef or got != expected:
            raise SignatureError(
                f"{self._label} returned {_named(treedef, got)}, and output_shapes says "
                f"{_named(declared.treedef, expected)}."
            )


def _named(treedef: Any, leaves: list[Any]) -> str:
    return str(treedef.unflatten([f"{d}[{','.join(map(str, s))}]" for s, d in leaves]))


def _on_replica(module: torch.nn.Module) -> Function[..., Any]:
    """A module whose parameters and buffers are constants, and which is not changed."""

    def run(*args: Any, **kwargs: Any) -> Any:
        layout = Layout(module)
        variables: dict[str, dict[str, torch.Tensor]] = {
            group: {k: wrap(from_torch(x), x.dtype) for k, x in tensors.items()}
            for group, tensors in layout.tensors.items()
        }
        forward = Forward(layout, module.training, lambda replica: replica, True)
        out = forward(variables, *args, **kwargs)
        return out[0] if module.training else out

    return run


def _argument(x: Any, dtype: torch.dtype) -> Tensor:
    want = canonical(dtype)
    return wrap(x if x.dtype == want else x.astype(want), dtype)


def _result(t: torch.Tensor) -> Any:
    return value_of(t) if isinstance(t, Tensor) else from_torch(t)


class _OnJax(DeviceContext):
    """``with torch.device("jax")``, for ``torch.normal(0.0, 1.0, size)`` too.

    PyTorch's default device leaves that one out: it would be drawn on the CPU, as a constant.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.normal and (len(args) > 2 or "size" in kwargs):
            kwargs = {"device": self.device, **kwargs}
        return super().__torch_function__(func, types, args, kwargs)


@contextlib.contextmanager
def running(default_dtype: torch.dtype, key: Any) -> Any:
    """The state in which ``fn`` is traced: device jax, JAX's derivatives, draws from the key."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_state.clean(default_dtype))
        # So that what fn differentiates itself (forces, torch.func) has its graph.
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_OnJax(torch.device("jax")))
        stack.enter_context(random.drawing_from(key, words=True))
        stack.enter_context(lowering_scope())
        stack.enter_context(differentiable_by_jax())
        yield


# --- the report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What became of the operators of a function. ``print`` shows it as a table.

    Each is ``{(operator, line of the user's code): count}``.
    """

    native: dict[tuple[str, str], int]
    decomposed: dict[tuple[str, str], int]
    bridge: dict[tuple[str, str], int]

    def __str__(self) -> str:
        lines = []
        for name, found in (
            ("lowered", self.native),
            ("decomposed", self.decomposed),
            ("through the bridge", self.bridge),
        ):
            lines.append(f"{name}: {sum(found.values())}")
            for (op, where), count in sorted(found.items()):
                lines.append(f"  {count:4d}  {op:45s} {where}")
        return "\n".join(lines)


def lowering_report(fn: Function[..., Any], *args: Any, **kwargs: Any) -> Report:
    """What ``torch2jax(fn, lower=True)`` makes of each operator, and on which line of your code.

    Args:
      fn: a PyTorch function or module, or what ``torch2jax(..., lower=True)`` returned, or an
        ``apply`` of ``from_module(..., lower=True)``.
      *args: arrays, ``jax.ShapeDtypeStruct``s or pytrees of them, as ``fn`` takes them.
      **kwargs: the same by keyword. ``rng=`` where random numbers are drawn.

    Returns:
      A ``Report`` with the operators that have a lowering (``native``), that go through PyTorch's
      decompositions (``decomposed``) and through the bridge (``bridge``): those run on PyTorch's
      kernels. Nothing is computed.

    >>> import torch, jax.numpy as jnp, torch2jax
    >>> report = torch2jax.lowering_report(lambda x: torch.sin(x) + 1, jnp.ones(3))
    >>> sorted(op for op, line in report.native), report.bridge
    (['aten.add.Tensor', 'aten.sin.default'], {})
    """
    from .._module import Apply
    from .._wrap import torch2jax

    if not isinstance(fn, Apply | LoweredFunction):
        fn = torch2jax(fn, lower=True, stochastic="rng" in kwargs)
    leaves, treedef = jax.tree.flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if hasattr(x, "shape")]

    def call(*arrays: Any) -> Any:
        full = list(leaves)  # numbers, flags and strings are what they are in a call
        for i, x in zip(places, arrays, strict=True):
            full[i] = x
        a, k = treedef.unflatten(full)
        # A fresh function each time: a cached trace would run nothing.
        return _untraced(fn)(*a, **k)

    with recorded() as events:
        jax.eval_shape(call, *[leaves[i] for i in places])
    groups: dict[str, dict[tuple[str, str], int]] = {"native": {}, "decomposed": {}, "bridge": {}}
    for (op, route, where), count in events.counts.items():
        groups[route][op, where] = count
    return Report(groups["native"], groups["decomposed"], groups["bridge"])


def _untraced(fn: Any) -> Any:
    """A copy of a wrapped function without its cached traces."""
    from .._module import Apply

    if isinstance(fn, Apply):
        return Apply(fn.layout, fn._wrap, fn._own_keywords, {**fn._options, "name": "report"})
    return LoweredFunction(fn.__wrapped__, fn._run, fn._label, fn._config)
