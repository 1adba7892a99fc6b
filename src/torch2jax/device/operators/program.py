"""A program is what an operator does for arguments of one kind, as a function of arrays."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax.core import Tracer
from torch.utils import _pytree as torch_tree
from torch.utils._python_dispatch import _disable_current_modes

from ..._bridge.calls.function import TorchFunction
from ..._bridge.calls.options import Options
from ..._bridge.wrapping import wrapped
from ..._conversions.convert import j2t
from ..._conversions.dtypes import dtype_j2t, x64_enabled
from ..._conversions.float64 import WIDE_FLOATS
from ..._conversions.narrowed import NARROWED, WIDENED
from ..._conversions.small import shown_dtype, widened
from ..._errors import Torch2JaxError
from ...lowerings.registry import DataDependentShape
from ...lowerings.vision import SHAPES_DEPEND_ON_VALUES
from ..tensors.sized_jit import SizedJit
from ..tensors.tensor import Tensor, from_torch, wrap
from ..thread_state import state
from . import cpu_kernel, meta
from .constants import value_of
from .extremes import extremes_of
from .operands import cells_of, fill
from .route import Route

__all__ = ["NoDecompositionHere", "OperatorProgram"]

_PYTHON = {bool: torch.bool, int: torch.int64, float: torch.float32, complex: torch.complex64}
_CLONE = torch.ops.aten.clone.default  # it keeps the dtype of an array that shows a wider one
_IGNORED = ("layout", "pin_memory", "memory_format", "non_blocking")


_WAYS = {"native": "_lowered", "decomposed": "_decomposed", "bridge": "_bridged"}


class NoDecompositionHere(Exception):
    """A decomposition does not cover these arguments, or calls its own operator."""


class OperatorProgram:
    """A program is a function of the arrays of the operands' cells; it includes in-place writes.

    ``args`` and ``kwargs`` are templates: they have a ``Slot`` in the place of each operand.
    ``patterns`` (of their chains) and ``dtypes`` are those of the operands, None for numbers. A
    view comes as ``Chain.operand`` returns it. ``mutated`` says which operands are written to.
    ``torch_dtypes`` are those of the results, which are known once it has run. ``wide`` says that
    there may be 64-bit floats: x64 is on, or an operand is said to be one.
    """

    def __init__(self, route: Route, args: Any, kwargs: Any, operands: Sequence[Any]) -> None:
        self.route, self.args, self.kwargs = route, args, kwargs
        tensors = [x if type(x) is Tensor else None for x in operands]
        chains = [None if t is None else t._chain for t in tensors]
        self.patterns = [None if c is None else c.pattern for c in chains]
        self.dtypes = [t.dtype if t is not None else None for t in tensors]
        self.has_tensors = any(t is not None for t in tensors)
        self.mutated = route.written(self.args, self.kwargs)
        self.outs = set(self.mutated if route.to_outs else ())
        self.cells = cells_of(operands)
        self.views_written = [slot for slot in self.mutated if chains[slot] is not None]
        self.torch_dtypes: list[torch.dtype] = []
        self.wide = x64_enabled() or not WIDE_FLOATS.isdisjoint(self.dtypes)
        said = [d for d in (*args, *kwargs.values()) if isinstance(d, torch.dtype)]
        wide = self.wide or not WIDE_FLOATS.isdisjoint((*said, torch.get_default_dtype()))
        self.names_dtype = bool(said) or not self.has_tensors
        self.carries = wide and not x64_enabled()
        """Whether arrays of 32 bits may stand for 64-bit floats."""
        self.asks_numbers = self.carries and any(type(x) is float for x in operands)
        self.narrow = None if x64_enabled() else extremes_of(route.target, self.kwargs, self.dtypes)
        self._way = getattr(self, _WAYS[route.kind])
        self.jitted = SizedJit(self.run, self._seen if chains.count(None) < len(chains) else None)
        self._checked: set[Any] = set()

    def values(self, arrays: Sequence[Any]) -> list[Any]:
        return [a if p is None else p.get(a) for a, p in zip(arrays, self.patterns, strict=True)]

    def _seen(self, *arrays: Any) -> list[Any]:
        return self.values(arrays[:-1] if self.route.random else arrays)

    def run(self, *arrays: Any) -> tuple[Any, list[Any]]:
        """Return results, and the new arrays of the cells that are written to. JAX traces it."""
        key = None
        if self.route.random:
            key, arrays = arrays[-1], arrays[:-1]
        out, new = self.compute(self.values(arrays), key)
        latest: dict[int, Any] = {}
        for slot, value in zip(self.mutated, new, strict=True):
            pattern, cell = self.patterns[slot], self.cells[slot]
            if pattern is not None:
                value = pattern.set(arrays[slot], latest.get(cell), value)
            latest[cell] = value
        return out, [latest[self.cells[slot]] for slot in self.mutated]

    def compute(self, values: list[Any], key: Any) -> tuple[Any, list[Any]]:
        """Return results and new values of what is written to, from the values of all operands."""
        given = values
        if self.route.func is not _CLONE:
            given = [
                v if d is None else widened(v) for v, d in zip(values, self.dtypes, strict=True)
            ]
        out, new = self._results(given, key)
        checked = []
        for slot, value in zip(self.mutated, new, strict=True):
            old, dtype = values[slot], self.dtypes[slot]
            assert dtype is not None
            if value.shape != old.shape and not self._resized(slot):
                if slot in self.outs:
                    raise RuntimeError(
                        f"out= of {self.route.func} is a view of shape {list(old.shape)}, and the "
                        f"result has shape {list(value.shape)}: on device jax a view is not resized"
                    )
                value = _filling(value, old.shape)
            if value.dtype != old.dtype:
                have = dtype_j2t(value.dtype)
                if not torch.can_cast(have, dtype):
                    raise RuntimeError(
                        f"result type {have} can't be cast to the desired output type {dtype}"
                    )
                value = jax.lax.convert_element_type(value, old.dtype)
            checked.append(value)
        return out, checked

    def _resized(self, slot: int) -> bool:
        """Say whether it is an ``out=``, which takes the shape of the result."""
        return slot in self.outs and self.patterns[slot] is None

    def _results(self, values: list[Any], key: Any) -> tuple[Any, list[Any]]:
        route = self.route
        if self.outs:
            self._refuse_as_pytorch(values)
        out, new = self._way(values, key)
        if new is not None:
            return out, new
        if not route.mutable:
            return out, []
        n = route.returns
        if route.returns_mutated or not n:
            return None, jax.tree.leaves(out)[: len(self.mutated)]
        # The functional form returns what is written to after the results.
        self.torch_dtypes = self.torch_dtypes[:n]
        return (out[0] if n == 1 else tuple(out[:n])), list(out[n:])

    # --- each of the three ways returns results, and new values of what ``func`` itself wrote to

    def _arguments(self, values: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        kwargs = {k: fill(v, values) for k, v in self.kwargs.items() if k not in self.route.drop}
        return [fill(a, values) for a in self.args], kwargs

    def _lowered(self, values: list[Any], key: Any) -> tuple[Any, None]:
        lowered = self.route.lowered
        args, kwargs = self._arguments(values)
        if self.narrow is not None:
            args = [self.narrow(x) for x in args]
            kwargs = {k: self.narrow(x) for k, x in kwargs.items()}
        given = {k: v for k, v in kwargs.items() if k not in _IGNORED and k != "device"}
        if not self.outs:
            self._refuse_as_pytorch(values)
        try:
            out = lowered.fn(key, *args, **given) if lowered.random else lowered.fn(*args, **given)
        except (TypeError, ValueError) as error:
            _raise_for_dim(error)
            if type(error) not in (TypeError, ValueError):
                raise
            # PyTorch raises a RuntimeError. A TypeError in a + b would make Python try b's way.
            kinds = [str(jax.typeof(v)) for v, d in zip(values, self.dtypes, strict=True) if d]
            raise RuntimeError(f"{self.route.func} of {', '.join(kinds)}: {error}") from error
        self.torch_dtypes = self._dtypes_of(out, args, kwargs, values)
        return out, None

    def _refuse_as_pytorch(self, values: Sequence[Any]) -> None:
        """Raise PyTorch's error where it refuses operands of these shapes."""
        shapes = tuple(
            [None if d is None else v.shape for v, d in zip(values, self.dtypes, strict=True)]
        )
        name = self.route.func._opname
        # A derivative is called with what fits; CUDA's grouped product takes less than ours.
        left_out = "backward" in name or "_grouped_mm" in name
        if left_out or shapes in self._checked:
            return
        asked = (self.route.func, values, self.dtypes, self._all_arguments)
        refusal: Any = None
        try:
            if self.route.kind == "native" or self.outs:
                with cpu_kernel.quiet() if self.outs else contextlib.nullcontext():
                    meta.results_for(*asked)
        except meta.Unknown:
            pass
        except Exception as error:
            refusal = cpu_kernel.refusal_of(*asked, wanted=True) or error
        if refusal is None and not (self.route.random or state.composite):
            refusal = cpu_kernel.refusal_of(*asked)
        if refusal is not None:
            raise refusal
        self._checked.add(shapes)

    def _all_arguments(self, values: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        kwargs = {k: fill(v, values) for k, v in self.kwargs.items()}
        if self.route.generator is not None:
            kwargs["generator"] = None
        return [fill(a, values) for a in self.args], kwargs

    def _decomposed(self, values: list[Any], key: Any) -> tuple[Any, list[Any] | None]:
        """Call the decomposition, a function of tensors, with tensors that hold the values."""
        route = self.route
        if not self.outs:
            self._refuse_as_pytorch(values)
        tensors = [v if d is None else wrap(v, d) for v, d in zip(values, self.dtypes, strict=True)]
        args, kwargs = self._arguments(tensors)
        before = state.active
        state.active = (*before, route.target)
        state.composite += 1
        try:
            out = route.decomposition(*args, **kwargs)
        except (AssertionError, ValueError, ZeroDivisionError) as error:
            if type(error) not in (AssertionError, ValueError, ZeroDivisionError):
                raise
            raise RuntimeError(f"{route.func}: {error}") from error
        finally:
            state.composite -= 1
            state.active = before
        if out is NotImplemented:
            raise NoDecompositionHere
        leaves = [x for x in torch_tree.tree_leaves(out) if x is not None]
        self.torch_dtypes = [
            x.dtype if isinstance(x, torch.Tensor) else _PYTHON[type(x)] for x in leaves
        ]
        arrays = jax.tree.map(_array_of, out, is_leaf=lambda x: isinstance(x, torch.Tensor))
        if route.mutable and not route.pure:
            new = [value_of(tensors[slot]) for slot in self.mutated]
            return (None if route.returns_mutated else arrays), new
        return arrays, None

    def _bridged(self, values: list[Any], key: Any) -> tuple[Any, list[Any] | None]:
        """Call the operator itself on PyTorch's own tensors."""
        route, pure = self.route, self.route.pure
        spots = [i for i, d in enumerate(self.dtypes) if d is not None]
        seen: list[list[torch.dtype]] = []

        def run(*tensors: torch.Tensor) -> Any:
            full = list(values)
            for i, t in zip(spots, tensors, strict=True):
                full[i] = t.clone() if not pure and i in self.mutated else t
            args, kwargs = self._arguments(full)
            if "device" in kwargs:
                kwargs["device"] = "cpu"
            out = route.target(*args, **kwargs)
            if route.returns_mutated and not pure:
                out = None
            seen.append([x.dtype for x in torch_tree.tree_leaves(out) if x is not None])
            return out if pure else (out, [full[slot] for slot in self.mutated])

        tensors = [values[i] for i in spots]
        dtypes = [self.dtypes[i] for i in spots]
        if any(isinstance(t, Tracer) for t in tensors):
            if state.strict:
                raise Torch2JaxError(
                    f'{route.func} has no lowering, and lower="strict" lets nothing go through the '
                    "bridge: use lower=True, or device.register_lowering."
                )
            dynamic = torch.Tag.dynamic_output_shape in route.target.tags
            if dynamic or route.target.name() in SHAPES_DEPEND_ON_VALUES:
                raise DataDependentShape(route.func)
            options = Options(arg_dtypes=tuple(dtypes))
            bridged = wrapped(TorchFunction, run, route.target.name(), options)
            out = bridged(*tensors)
        else:
            with torch.no_grad(), _disable_current_modes():
                host = [j2t(np.asarray(t)).to(d) for t, d in zip(tensors, dtypes, strict=True)]
                results = run(*host)
                out = torch_tree.tree_map(
                    lambda x: from_torch(x) if isinstance(x, torch.Tensor) else x, results
                )
        self.torch_dtypes = seen[-1] if seen else self.torch_dtypes
        return (out, None) if pure else (out[0], list(out[1]))

    # --- PyTorch's dtypes of the results

    def makes_wide(self) -> torch.dtype | None:
        """Return the dtype of a result that is float64 or complex128."""
        return next((d for d in self.torch_dtypes if d in WIDE_FLOATS), None)

    def _dtypes_of(self, out: Any, args: Any, kwargs: Any, values: Any) -> list[torch.dtype]:
        """Return PyTorch's dtypes. While x64 is off arrays of 32 bits stand for 64 too."""
        leaves = [x if hasattr(x, "dtype") else np.asarray(x) for x in jax.tree.leaves(out)]
        found = [shown_dtype(x.dtype) for x in leaves]
        if x64_enabled():
            return found
        if self.carries:
            said = [d for d in (*args, *kwargs.values()) if isinstance(d, torch.dtype)]
            found = self._floats_of(found, said, values)
        return self._integers_of(found, args, kwargs, values) if torch.int32 in found else found

    def _floats_of(
        self, found: list[torch.dtype], said: list[torch.dtype], values: Any
    ) -> list[torch.dtype]:
        """Return dtypes with float64 and complex128 where PyTorch's results have them."""
        if self.has_tensors:
            asked = self._asked(values)
            if asked is not None and len(asked) == len(found):
                return [
                    a if a in WIDE_FLOATS and NARROWED[a] is d else d
                    for a, d in zip(asked, found, strict=True)
                ]
        if said and not WIDE_FLOATS & {*said}:
            return found
        return [WIDENED[d] if WIDENED.get(d) in WIDE_FLOATS else d for d in found]

    def _integers_of(
        self, found: list[torch.dtype], args: Any, kwargs: Any, values: Any
    ) -> list[torch.dtype]:
        """Return dtypes with int64 where PyTorch's results have it."""
        narrow = torch.int64
        if self.route.lowered.int32 or torch.int32 in (*args, *kwargs.values()):
            narrow = torch.int32
        elif torch.int64 in (*args, *kwargs.values()):
            narrow = torch.int64
        elif torch.int32 in self.dtypes:
            asked = self._asked(values)
            if asked is not None and len(asked) == len(found):
                return asked
            ints = [d for d in self.dtypes if d in (torch.int32, torch.int64)]
            narrow = torch.int32 if all(d is torch.int32 for d in ints) else torch.int64
        return [narrow if d is torch.int32 else d for d in found]

    def _asked(self, values: Any) -> list[torch.dtype] | None:
        """Ask PyTorch for the dtypes of the results, with meta tensors."""
        try:
            out = meta.results_for(self.route.target, values, self.dtypes, self._arguments)
        except Exception:
            return None
        return [x.dtype for x in torch_tree.tree_leaves(out) if isinstance(x, torch.Tensor)]


def _filling(value: Any, shape: tuple[int, ...]) -> Any:
    """Return a result in the shape of what it is written to."""
    try:
        return jax.numpy.broadcast_to(value, shape)
    except ValueError:
        raise RuntimeError(
            f"output with shape {list(shape)} doesn't match the broadcast shape {list(value.shape)}"
        ) from None


_AXIS = re.compile(r"axis (-?\d+) is out of bounds for array of dimension (\d+)")


def _raise_for_dim(error: Exception) -> None:
    """Raise PyTorch's IndexError where JAX refuses a dimension."""
    found = _AXIS.search(str(error))
    if found is not None:
        n = max(int(found[2]), 1)
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-n}, {n - 1}], but got "
            f"{found[1]})"
        ) from error
    if "zero-size dimension for reduction" in str(error):
        raise IndexError(
            "Expected reduction dim to have non-zero size: there is nothing to reduce"
        ) from error


def _array_of(x: Any) -> Any:
    if isinstance(x, Tensor):
        return value_of(x)
    if isinstance(x, torch.Tensor):
        return from_torch(x)
    return x
