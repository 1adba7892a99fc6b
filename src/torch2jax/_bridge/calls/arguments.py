"""The arguments of a call form a tree of operands and static values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jax.tree_util import tree_flatten_with_path

from ..._errors import SignatureError
from . import checks

Tensor = torch.Tensor
Tensors = tuple[Tensor, ...]
Casts = tuple[tuple[int, torch.dtype], ...]
"""(operand, dtype) pairs name the operands that reach ``fn`` in another dtype than they have."""


class Static:
    """A static argument is one leaf; two are equal where their types and values are."""

    def __init__(self, value: Any, where: str, label: str) -> None:
        self.value = value
        key = (slice, value.start, value.stop, value.step) if isinstance(value, slice) else value
        try:
            hash(key)
        except TypeError:
            raise SignatureError(
                f"the static argument {where} of {label} is a {type(value).__name__}, which cannot "
                "be hashed; static arguments select a trace, so pass a tuple or a frozen object."
            ) from None
        self.key = (type(value), key)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.key == other.key


class DeclaresStatic(Protocol):
    """A user declares static arguments by these options."""

    @property
    def static_argnums(self) -> tuple[int, ...]: ...

    @property
    def static_argnames(self) -> tuple[str, ...]: ...


def mark_static(
    options: DeclaresStatic,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    static: Callable[[Any, str], Static],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``(args, kwargs)`` with one leaf, made by ``static``, for each static argument."""
    marked = list(args)
    for i in options.static_argnums:
        if -len(args) <= i < len(args):
            marked[i] = static(args[i], f"args[{i}]")
    return tuple(marked), {
        k: static(v, f"kwargs[{k!r}]") if k in options.static_argnames else v
        for k, v in kwargs.items()
    }


@dataclass(frozen=True)
class Arguments:
    """An ``Arguments`` says how flat operands become the arguments of ``fn``.

    ``statics`` are (leaf index, static value) pairs; the other leaves are operands in order.
    ``casts`` gives operands another dtype before ``fn`` sees them. ``copies`` are the operands that
    ``fn`` changes undeclared, and which it gets as private copies.
    """

    treedef: Any
    statics: tuple[tuple[int, Static], ...]
    labels: tuple[str, ...]
    casts: Casts = ()
    copies: tuple[int, ...] = ()

    def unflatten(self, operands: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``(args, kwargs)`` with these operands in their places."""
        leaves = list(operands)
        for i, static in self.statics:  # they are in ascending order
            leaves.insert(i, static.value)
        return self.treedef.unflatten(leaves)

    def prepare(self, operands: Tensors) -> Tensors:
        """Return the operands as ``fn`` gets them: cast, and copied where it changes them."""
        if not self.casts and not self.copies:
            return operands
        xs = list(operands)
        for i, dtype in self.casts:
            xs[i] = xs[i].to(dtype)
        for i in self.copies:
            xs[i] = xs[i].clone()
        return tuple(xs)

    def applied(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``fn`` as a function of prepared operands; it returns what ``fn`` returns."""
        args, kwargs = self.unflatten([_HOLE] * len(self.labels))
        positional = not kwargs and not self.statics and all(a is _HOLE for a in args)
        if positional:
            return fn

        def call(*operands: Tensor) -> Any:
            args, kwargs = self.unflatten(operands)
            return fn(*args, **kwargs)

        return call


_HOLE = object()


def arguments_of(treedef: Any, statics: tuple[tuple[int, Static], ...]) -> Arguments:
    """Return the arguments of calls with this structure, before anything is known of dtypes."""
    static = {i for i, _ in statics}
    paths, _ = tree_flatten_with_path(treedef.unflatten([0] * treedef.num_leaves))
    labels = tuple(checks.argument_label(p) for i, (p, _) in enumerate(paths) if i not in static)
    return Arguments(treedef, statics, labels)
