"""Options of whole arguments become facts about each operand."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from jax.core import Tracer
from jax.tree_util import tree_flatten

from ..._conversions.convert import j2t
from ..._conversions.dtypes import dtype_j2t, x64_enabled
from ..._errors import SignatureError
from ..torch_side.modules.forward import Forward
from . import checks
from .arguments import Arguments, Casts, Static, mark_static
from .options import Options


@dataclass(frozen=True)
class _Spot:
    """A spot stands for a leaf of the arguments: operand ``index``, or a static one (None)."""

    index: int | None


class OperandOptions:
    """An ``OperandOptions`` tells what options say about operands of calls with one structure."""

    def __init__(
        self, fn: Callable[..., Any], options: Options, arguments: Arguments, label: str
    ) -> None:
        self.fn, self.options, self.label = fn, options, label
        statics = {i for i, _ in arguments.statics}
        spots, count = [], 0
        for i in range(arguments.treedef.num_leaves):
            spots.append(_Spot(None if i in statics else count))
            count += i not in statics
        self.args, self.kwargs = arguments.treedef.unflatten(spots)
        self.examples: dict[int, Any] = {}
        if options.examples is not None:
            static = functools.partial(Static, label=label)
            examples = tree_flatten(mark_static(options, *options.examples, static))[0]
            self.examples = {
                s.index: x for s, x in zip(spots, examples, strict=True) if s.index is not None
            }
        self._values: dict[int, Any] = {}
        if isinstance(fn, Forward):
            for i, operand in enumerate(arguments.labels):
                if operand in fn.examples:
                    self.examples.setdefault(i, fn.examples[operand])
                elif operand in fn.values:
                    self._values[i] = fn.values[operand]

    def of_argnums(self, argnums: Sequence[int], option: str) -> tuple[int, ...]:
        """Return the operands in the positional arguments that an option names."""
        found: list[int] = []
        for i in argnums:
            checks.check_position(i, len(self.args), option, self.label)
            found += _indices_in(self.args[i])
        return tuple(found)

    def nondiff(self, labels: Sequence[str]) -> frozenset[int]:
        """Return the operands that are never differentiated."""
        never = getattr(self.fn, "never_differentiated", ())
        found = {i for i, label in enumerate(labels) if label.startswith(never)} if never else set()
        found |= set(self.of_argnums(self.options.nondiff_argnums, "nondiff_argnums"))
        if self.options.nondiff_mask is not None:
            items = self._spread(self.options.nondiff_mask, "nondiff_mask")
            found |= {k for k, masked in items.items() if masked}
        return frozenset(found)

    def casts(self, dtypes: Sequence[Any]) -> Casts:
        """Return the casts of operands that ``arg_dtypes`` or 64-bit examples ask for."""
        return tuple(
            (k, dtype)
            for k, dtype in sorted(self._wanted(dtypes).items())
            if dtype is not dtype_j2t(dtypes[k])
        )

    def narrow(self, dtypes: Sequence[Any]) -> frozenset[int]:
        """Return the int32 operands that may stand for int64: x64 is off and no option decides."""
        if x64_enabled():
            return frozenset()
        said = self._wanted(dtypes)
        for k in list(said):
            x = self.examples.get(k)
            by_array = x is not None and not isinstance(x, torch.Tensor)
            # A JAX example of int32 stands for int64 as the operand itself does.
            if by_array and said[k] is torch.int32 and k not in self._arg_dtypes():
                del said[k]
        return frozenset(
            i for i, d in enumerate(dtypes) if dtype_j2t(d) is torch.int32 and i not in said
        )

    def _arg_dtypes(self) -> dict[int, Any]:
        given = self._by_operand(self.options.arg_dtypes, "arg_dtypes")
        return {k: dtype for k, dtype in given.items() if dtype is not None}

    def _wanted(self, dtypes: Sequence[Any]) -> dict[int, torch.dtype]:
        """Return the torch dtypes that ``arg_dtypes`` and examples ask for."""
        wanted: dict[int, Any] = {}
        for k, x in self.examples.items():
            dtype = checks.example_dtype(x)
            # It may be wider than JAX carries it. It counts where JAX narrows it to this dtype.
            if dtype is not None and checks.leaf_aval(x)[1] == dtypes[k]:
                wanted[k] = dtype
        wanted |= self._arg_dtypes()
        for dtype in wanted.values():
            if not isinstance(dtype, torch.dtype):
                raise SignatureError(
                    f"arg_dtypes of {self.label} has {dtype!r}; give torch dtypes such as "
                    "torch.int64, or None."
                )
        return wanted

    def in_specs(self) -> dict[int, Any] | None:
        """Return the specs of operands (None where types say it), or None without ``in_specs``."""
        given = self.options.in_specs
        return None if given is None else self._by_operand(given, "in_specs")

    def _by_operand(self, given: Any, option: str) -> dict[int, Any]:
        """Return the items of a prefix tree over positional arguments, or of a dict by name."""
        if not isinstance(given, dict):
            return {} if given is None else self._spread(given, option)
        found: dict[int, Any] = {}
        for name, item in given.items():
            argument = self._argument(name, option)
            items = checks.prefix_leaves(item, argument, option, self.label)
            spots = jax.tree.leaves(argument)
            found |= {s.index: x for s, x in zip(spots, items, strict=True) if s.index is not None}
        return found

    def example_value(self, index: int, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Return the value of an operand's example, if it has one of this shape."""
        x = _value(self.examples.get(index, self._values.get(index)))
        fits = x is not None and tuple(x.shape) == shape
        return x if fits else None

    def _spread(self, tree: Any, option: str) -> dict[int, Any]:
        """Return the items of a prefix tree over the positional arguments, by operand."""
        tree = tuple(tree) if isinstance(tree, list) else tree
        items = checks.prefix_leaves(tree, self.args, option, self.label)
        spots = jax.tree.leaves(self.args)
        return {s.index: x for s, x in zip(spots, items, strict=True) if s.index is not None}

    def _argument(self, name: str, option: str) -> Any:
        """Return the argument that ``fn``'s parameter ``name`` gets."""
        if name in self.kwargs:
            return self.kwargs[name]
        target = self.fn.forward if isinstance(self.fn, torch.nn.Module) else self.fn
        try:
            return inspect.signature(target).bind(*self.args, **self.kwargs).arguments[name]
        except (TypeError, ValueError, KeyError):
            raise SignatureError(
                f"{option} of {self.label} names {name!r}, which is not an argument of the call."
            ) from None


def _indices_in(tree: Any) -> list[int]:
    return [s.index for s in jax.tree.leaves(tree) if s.index is not None]


def values_of(operands: Sequence[Any]) -> list[torch.Tensor | None]:
    """Return the values of a call's operands; None where one is being traced."""
    return [None if is_unknown(x) else _value(jax.numpy.asarray(x)) for x in operands]


def is_unknown(x: Any) -> bool:
    """Return whether an operand of a call has a type alone, and no value."""
    return isinstance(x, Tracer | jax.ShapeDtypeStruct)


def _value(x: Any) -> torch.Tensor | None:
    """Return the value of an operand or an example, if it has one."""
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
        # A donated array has no value left. One over several devices has none for one tensor.
        x = None if x.is_deleted() or len(x.devices()) > 1 else j2t(x)
    elif isinstance(x, np.ndarray):
        x = torch.from_numpy(x)
    return x.detach() if isinstance(x, torch.Tensor) and x.device.type != "meta" else None
