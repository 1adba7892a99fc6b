"""These functions check once what the user said, and raise errors in the user's words."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Sequence, Set
from typing import Any

import jax
import numpy as np
import torch
from jax.tree_util import keystr

from ..._conversions.dtypes import canonical, dtype_j2t, x64_enabled
from ..._errors import SignatureError

STATIC_TYPES = (
    bool,
    str,
    bytes,
    slice,
    range,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
    type(Ellipsis),
)
"""Arguments of these types are static by themselves: ``fn`` gets them as they are."""


def argument_label(path: Sequence[Any]) -> str:
    """Return ``args[0]['w']`` or ``kwargs['scale']`` for a path into ``(args, kwargs)``."""
    return ("kwargs" if path[0].idx else "args") + keystr(tuple(path[1:]))


def check_call(fn: Callable[..., Any], args: Any, kwargs: Any, label: str) -> None:
    """Raise where ``fn(*args, **kwargs)`` has the wrong number or names of arguments."""
    target = fn.forward if isinstance(fn, torch.nn.Module) else fn
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # torch's own functions have no signature
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise SignatureError(
            f"{label}{signature} was called with {len(args)} positional argument"
            f"{'' if len(args) == 1 else 's'}"
            + (f" and the keywords {sorted(kwargs)}" if kwargs else "")
            + f": {error}."
        ) from None


def requires(fn: Callable[..., Any], name: str) -> bool:
    """Return whether ``fn`` cannot be called without its argument ``name``."""
    try:
        parameter = inspect.signature(fn).parameters.get(name)
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.default is parameter.empty


def indices(value: Any, option: str, label: str) -> tuple[int, ...]:
    """Return the positions that an option names by an int or a sequence of them."""
    items = () if value is None else tuple(value) if _is_sequence(value) else (value,)
    if any(isinstance(i, bool) or not isinstance(i, int | np.integer) for i in items):
        raise SignatureError(
            f"{option}={value!r} of {label} must be an int or a sequence of ints: positions of "
            "arguments."
        )
    return tuple(map(int, items))


def names(value: Any, option: str, label: str) -> tuple[str, ...]:
    """Return the arguments that an option names by a str or a sequence of them."""
    items = tuple(value) if _is_sequence(value) else (value,)
    if not all(isinstance(name, str) for name in items):
        raise SignatureError(
            f"{option}={value!r} of {label} must be a str or a sequence of them: argument names."
        )
    return items


def one_name(value: Any, option: str, label: str) -> str | None:
    """Return the name that an option gives."""
    if value is not None and not (isinstance(value, str) and value):
        raise SignatureError(f"{option}={value!r} of {label} must be a name (a str) or None.")
    return value


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence | Set) and not isinstance(value, str)


def resolve_statics(
    fn: Callable[..., Any], static_argnums: Any, static_argnames: Any, label: str
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return positions and names of static arguments; one implies the other, as in ``jax.jit``."""
    nums = indices(static_argnums, "static_argnums", label)
    chosen = () if static_argnames is None else names(static_argnames, "static_argnames", label)
    target = fn.forward if isinstance(fn, torch.nn.Module) else fn
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return nums, chosen
    both = [p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters]
    kinds = {p.kind for p in parameters}
    n = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        for i in nums:
            if not -n <= i < n:
                raise SignatureError(
                    f"static_argnums of {label} names argument {i}, and it takes {n} positional "
                    "arguments."
                )
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for name in chosen:
            if not any(p.name == name and p.kind is not p.POSITIONAL_ONLY for p in parameters):
                raise SignatureError(
                    f"static_argnames of {label} names {name!r}, which it does not take by keyword."
                )
    if static_argnums is None:
        nums = tuple(i for i, p in enumerate(parameters) if both[i] and p.name in chosen)
    elif static_argnames is None:
        positions = {i % len(parameters) for i in nums} if parameters else set()
        chosen = tuple(parameters[i].name for i in sorted(positions) if both[i])
    return nums, chosen


def check_position(index: int, count: int, option: str, label: str) -> None:
    """Raise where a call of ``count`` positional arguments has none at this position."""
    if not -count <= index < count:
        raise SignatureError(
            f"{option} of {label} names argument {index}; the call has {count} positional "
            "arguments."
        )


def refuse_wide_int(x: Any, what: str) -> None:
    """Raise where a Python number has more bits than JAX's integers."""
    if isinstance(x, int) and x.bit_length() > (63 if x64_enabled() else 31):
        raise SignatureError(
            f"{what} is {x}, which does not fit JAX's integers; pass a float, or name the argument "
            "in static_argnums or static_argnames."
        )


def leaf_aval(x: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape of an example and the dtype in which JAX carries it."""
    if isinstance(x, torch.Tensor):
        return tuple(x.shape), np.dtype(canonical(x.dtype))
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return tuple(x.shape), np.dtype(jax.dtypes.canonicalize_dtype(x.dtype))
    aval = jax.typeof(x)
    return tuple(aval.shape), np.dtype(aval.dtype)


def example_dtype(x: Any) -> torch.dtype | None:
    """Return the torch dtype that an example asks for, a 64-bit one even with x64 off."""
    if isinstance(x, torch.Tensor):
        return x.dtype
    if hasattr(x, "dtype"):
        return dtype_j2t(x.dtype)
    return None


def prefix_leaves(prefix: Any, args: Any, what: str, label: str) -> list[Any]:
    """Return an item of ``prefix``, a tree or a prefix of one, for each leaf of ``args``."""
    try:
        spread = jax.tree.map(
            lambda item, sub: jax.tree.map(lambda _: _Item(item), sub),
            prefix,
            args,
            is_leaf=lambda x: x is None,
        )
    except ValueError as error:
        raise SignatureError(
            f"{what} of {label} must have the structure of the arguments, or of a prefix of it: "
            f"{error}"
        ) from None
    return [item.value for item in jax.tree.leaves(spread)]


class _Item:
    def __init__(self, value: Any) -> None:
        self.value = value


def check_structure(got: Any, expected: Any, label: str) -> None:
    """Raise where a call's arguments have another structure than the examples."""
    if got != expected:
        raise SignatureError(
            f"{label} was wrapped for the arguments {_describe(expected)} and called with "
            f"{_describe(got)}. Wrap it again for another structure, or without examples."
        )


def _describe(treedef: Any) -> str:
    args, kwargs = treedef.unflatten(["*"] * treedef.num_leaves)
    items = [_show(a) for a in args] + [f"{k}={_show(v)}" for k, v in kwargs.items()]
    return f"({', '.join(items)})"


def _show(tree: Any) -> str:
    return str(tree).replace("'*'", "*")
