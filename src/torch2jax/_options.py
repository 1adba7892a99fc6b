"""The options of ``torch2jax``: checked, hashable, and read as facts about operands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jax.tree_util import tree_flatten

from . import _signature as sig
from ._convert import j2t
from ._dtypes import dtype_j2t
from ._errors import SignatureError
from ._flat import Arguments, Static


@dataclass(frozen=True, eq=False)
class Config:
    """The options of one ``torch2jax`` call."""

    examples: tuple[tuple[Any, ...], dict[str, Any]] | None
    output_shapes: Any
    depth: int | None
    nondiff_argnums: tuple[int, ...]
    nondiff_mask: Any
    tape: bool
    vmap_method: str
    arg_dtypes: Any
    inplace_argnums: tuple[int, ...]
    inplace_single: bool
    out_arg: str | None
    static_argnums: tuple[int, ...]
    static_argnames: tuple[str, ...]
    stochastic: bool
    side_effects: bool
    lock: Any
    in_specs: Any
    out_specs: Any
    mesh: Any
    name: str | None
    default_dtype: torch.dtype
    default_device: torch.device

    def key(self, label: str) -> tuple[Hashable, ...]:
        """Equal for equal options. Trees count by structure and leaves, arrays by their avals."""

        def one(option: str, value: Any) -> Hashable:
            try:
                key = _tree_key(value) if option in _TREES else value
                hash(key)
            except (TypeError, ValueError) as error:  # keys of a dict that cannot be sorted
                raise SignatureError(
                    f"{option} of {label} cannot be read, or compared with another: {error}"
                ) from None
            return key

        return tuple(one(option, value) for option, value in vars(self).items())

    def with_updated(
        self, arguments: Arguments, inplace: Sequence[int], result: Any, updated: Sequence[Any]
    ) -> Any:
        """``(result, updated arguments)``, in the structure of the arguments."""
        by_leaf = dict(zip(inplace, updated, strict=True))
        args, _ = arguments.unflatten([by_leaf.get(i) for i in range(len(arguments.labels))])
        chosen = tuple(args[i] for i in self.inplace_argnums)
        values = chosen[0] if self.inplace_single else chosen
        return values if result is None else (result, values)

    def changes_nothing(self) -> bool:
        """Whether the function means what it means without options: they say how, not what."""
        given = (
            *(self.nondiff_argnums, self.inplace_argnums, self.static_argnums),
            *(self.static_argnames, self.stochastic, self.out_arg, self.lock),
        )
        unset = (self.nondiff_mask, self.arg_dtypes, self.out_specs, self.depth)
        return not any(given) and all(x is None for x in unset)


_TREES = (
    "examples",
    "output_shapes",
    "nondiff_mask",
    "arg_dtypes",
    "lock",
    "in_specs",
    "out_specs",
)


def _tree_key(tree: Any) -> Hashable:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple(map(_leaf_key, leaves))


def _leaf_key(x: Any) -> Hashable:
    if isinstance(x, torch.Size | torch.dtype | PartitionSpec | bool | str | int | float):
        return type(x), x
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.shape, x.dtype
    return id(x)  # kept alive by the configuration that holds it


@dataclass(frozen=True)
class _Spot:
    """Stands for a leaf of the arguments: the ``index``-th operand, or a static one (None)."""

    index: int | None


class Operands:
    """The options as facts about the operands of calls with one structure."""

    def __init__(
        self, fn: Callable[..., Any], config: Config, arguments: Arguments, label: str
    ) -> None:
        self.fn, self.config, self.label = fn, config, label
        static = {i for i, _ in arguments.statics}
        spots, count = [], 0
        for i in range(arguments.treedef.num_leaves):
            spots.append(_Spot(None if i in static else count))
            count += i not in static
        self.args, self.kwargs = arguments.treedef.unflatten(spots)
        self.examples: dict[int, Any] = {}
        if config.examples is not None:
            examples = tree_flatten(mark_static(config, *config.examples, label))[0]
            self.examples = {
                s.index: x for s, x in zip(spots, examples, strict=True) if s.index is not None
            }

    def of_argnums(self, argnums: Sequence[int], option: str) -> tuple[int, ...]:
        """Operands of whole positional arguments."""
        found: list[int] = []
        for i in argnums:
            if not -len(self.args) <= i < len(self.args):
                raise SignatureError(
                    f"{option} of {self.label} names argument {i}; the call has {len(self.args)} "
                    "positional arguments."
                )
            found += _indices_in(self.args[i])
        return tuple(found)

    def nondiff(self, labels: Sequence[str]) -> frozenset[int]:
        """Operands that are never differentiated."""
        never = getattr(self.fn, "never_differentiated", ())
        found = {i for i, label in enumerate(labels) if label.startswith(never)} if never else set()
        found |= set(self.of_argnums(self.config.nondiff_argnums, "nondiff_argnums"))
        if self.config.nondiff_mask is not None:
            items = self._spread(self.config.nondiff_mask, "nondiff_mask")
            found |= {k for k, masked in items.items() if masked}
        return frozenset(found)

    def casts(self, dtypes: Sequence[Any]) -> tuple[tuple[int, torch.dtype], ...]:
        """Operands that reach ``fn`` in another dtype, from ``arg_dtypes`` or 64-bit examples."""
        wanted: dict[int, Any] = {}
        for k, x in self.examples.items():
            dtype = sig.example_dtype(x)
            # Wider than JAX carries it: with x64 off, in the dtype that JAX gives such an example.
            if dtype is not None and sig.leaf_aval(x)[1] == dtypes[k]:
                wanted[k] = dtype
        given = self._by_operand(self.config.arg_dtypes, "arg_dtypes")
        wanted |= {k: dtype for k, dtype in given.items() if dtype is not None}
        for dtype in wanted.values():
            if not isinstance(dtype, torch.dtype):
                raise SignatureError(
                    f"arg_dtypes of {self.label} has {dtype!r}; give torch dtypes such as "
                    "torch.int64, or None."
                )
        return tuple(
            (k, dtype) for k, dtype in sorted(wanted.items()) if dtype is not dtype_j2t(dtypes[k])
        )

    def in_specs(self) -> dict[int, Any] | None:
        """Specs of operands, None where types say it; None where ``in_specs`` is not given."""
        given = self.config.in_specs
        return None if given is None else self._by_operand(given, "in_specs")

    def _by_operand(self, given: Any, option: str) -> dict[int, Any]:
        """Items of a prefix tree over the positional arguments, or of a dict by argument name."""
        if not isinstance(given, dict):
            return {} if given is None else self._spread(given, option)
        found: dict[int, Any] = {}
        for name, item in given.items():
            argument = self._argument(name, option)
            items = sig.prefix_leaves(item, argument, option, self.label)
            spots = jax.tree.leaves(argument)
            found |= {s.index: x for s, x in zip(spots, items, strict=True) if s.index is not None}
        return found

    def example_value(self, index: int, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The value of an operand's example, if it has one and fits."""
        x = self.examples.get(index)
        if isinstance(x, jax.Array) and not isinstance(x, Tracer):
            # A donated array has no value left, and one over several devices none for one tensor.
            x = None if x.is_deleted() or len(x.devices()) > 1 else j2t(x)
        elif isinstance(x, np.ndarray):
            x = torch.from_numpy(x)
        if isinstance(x, torch.Tensor) and tuple(x.shape) == shape and x.device.type != "meta":
            return x.detach()
        return None

    def _spread(self, tree: Any, option: str) -> dict[int, Any]:
        """Items of a prefix tree over the positional arguments, by operand."""
        tree = tuple(tree) if isinstance(tree, list) else tree
        items = sig.prefix_leaves(tree, self.args, option, self.label)
        spots = jax.tree.leaves(self.args)
        return {s.index: x for s, x in zip(spots, items, strict=True) if s.index is not None}

    def _argument(self, name: str, option: str) -> Any:
        """The argument passed to ``fn``'s parameter ``name``."""
        if name in self.kwargs:
            return self.kwargs[name]
        target = self.fn.forward if isinstance(self.fn, torch.nn.Module) else self.fn
        try:
            return inspect.signature(target).bind(*self.args, **self.kwargs).arguments[name]
        except (TypeError, ValueError, KeyError):
            raise SignatureError(
                f"{option} of {self.label} names {name!r}, which is not an argument of the call."
            ) from None


def mark_static(config: Config, args: Any, kwargs: Any, label: str) -> tuple[Any, Any]:
    """``(args, kwargs)`` with declared static arguments as single leaves."""
    marked = list(args)
    for i in config.static_argnums:
        if -len(args) <= i < len(args):
            marked[i] = Static(args[i], f"args[{i}]", label)
    return tuple(marked), {
        k: Static(v, f"kwargs[{k!r}]", label) if k in config.static_argnames else v
        for k, v in kwargs.items()
    }


def _indices_in(tree: Any) -> list[int]:
    return [s.index for s in jax.tree.leaves(tree) if s.index is not None]
