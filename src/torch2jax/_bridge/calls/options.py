"""``torch2jax`` keeps its options here, after they are checked."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import torch
from jax.sharding import PartitionSpec

from ..._errors import SignatureError
from .arguments import Arguments


@dataclass(frozen=True, eq=False)
class Options:
    """``Options`` holds the options of one ``torch2jax`` call."""

    examples: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    output_shapes: Any = None
    depth: int | None = None
    nondiff_argnums: tuple[int, ...] = ()
    nondiff_mask: Any = None
    tape: bool = True
    vmap_method: str = "auto"
    arg_dtypes: Any = None
    inplace_argnums: tuple[int, ...] = ()
    inplace_single: bool = False
    out_arg: str | None = None
    static_argnums: tuple[int, ...] = ()
    static_argnames: tuple[str, ...] = ()
    stochastic: bool = False
    strict: bool = False
    """Whether ``lower="strict"`` was given."""
    compiled: bool = False
    side_effects: bool = False
    lock: Any = None
    in_specs: Any = None
    out_specs: Any = None
    mesh: Any = None
    name: str | None = None
    default_dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    default_device: torch.device = field(default_factory=torch.get_default_device)

    def key(self, label: str) -> tuple[Hashable, ...]:
        """Return a key that is equal for equal options; trees count by structure and leaves."""

        def one(option: str, value: Any) -> Hashable:
            try:
                key = _tree_key(value) if option in _TREES else value
                hash(key)
            except (TypeError, ValueError) as error:  # a dict may have keys that cannot be sorted
                raise SignatureError(
                    f"{option} of {label} cannot be read, or compared with another: {error}"
                ) from None
            return key

        return tuple(one(option, value) for option, value in vars(self).items())

    def with_updated(
        self, arguments: Arguments, inplace: Sequence[int], result: Any, updated: Sequence[Any]
    ) -> Any:
        """Return ``(result, updated arguments)``, the latter in the structure of the arguments."""
        by_leaf = dict(zip(inplace, updated, strict=True))
        args, _ = arguments.unflatten([by_leaf.get(i) for i in range(len(arguments.labels))])
        chosen = tuple(args[i] for i in self.inplace_argnums)
        values = chosen[0] if self.inplace_single else chosen
        return values if result is None else (result, values)

    def changes_nothing(self) -> bool:
        """Return whether the options only say how the function runs, and not what it computes."""
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
    return id(x)  # the options keep it alive, so no other object gets its id
