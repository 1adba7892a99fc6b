"""The result of a function is a tree of tensors with shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from jax.tree_util import keystr, tree_flatten, tree_flatten_with_path

from ..._conversions.dtypes import canonical, dtype_j2t
from ..._errors import SignatureError, UnsupportedDtypeError
from ..torch_side.inference import ShapeDependsOnValues
from .arguments import Tensor, Tensors
from .checks import leaf_aval


@dataclass(frozen=True)
class ResultLeaf:
    """One tensor of a result has a path, a shape, and a dtype in torch and in JAX."""

    label: str
    shape: tuple[int, ...]
    torch_dtype: torch.dtype
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Result:
    """A result is described by its tree and by its tensors."""

    treedef: Any
    leaves: tuple[ResultLeaf, ...]
    declared: bool = False
    """Whether ``output_shapes=`` gives it; otherwise it is inferred."""


def flatten_result(out: Any, label: str) -> tuple[list[tuple[str, Tensor]], Any]:
    """Return paths and tensors of a result, and its treedef.

    Mappings that JAX does not know become dicts, and Python numbers become 0-d tensors.
    Anything else that is not a tensor is an error, which names its path.
    """
    paths, treedef = tree_flatten_with_path(_plain(out, "result", label))
    return [(f"result{keystr(path)}", leaf) for path, leaf in paths], treedef


def _plain(out: Any, where: str, label: str) -> Any:
    """Return ``out`` with dicts for unknown mappings and tensors for numbers."""

    def leaf(path: Any, x: Any) -> Any:
        if isinstance(x, Tensor):
            return x
        here = where + keystr(path)
        if isinstance(x, Mapping):
            return {k: _plain(v, f"{here}[{k!r}]", label) for k, v in x.items()}
        if isinstance(x, tuple):  # pytrees do not know torch.return_types
            return tuple(_plain(v, f"{here}[{k}]", label) for k, v in enumerate(x))
        if isinstance(x, bool | int | float | complex | np.generic):
            return torch.as_tensor(x)
        if isinstance(x, np.ndarray):
            remedy = "convert it to a tensor with torch.from_numpy"
        elif isinstance(x, jax.Array):
            remedy = "convert it to a tensor with torch2jax.j2t"
        else:
            remedy = (
                "return tensors, numbers, None, or dicts, lists, tuples and registered pytrees "
                "of them"
            )
        if type(x).__name__.endswith("Cache"):
            remedy = "switch it off (use_cache=False), or return its tensors"
        path_text = here.removeprefix("result") or "its result"
        raise SignatureError(
            f"{label} returned something that has no JAX counterpart: {path_text}: "
            f"{type(x).__name__}; {remedy}."
        )

    return jax.tree_util.tree_map_with_path(leaf, out)


def describe_result(out: Any, label: str, none_allowed: bool) -> Result:
    """Return the structure of what ``fn`` returned at trace time."""
    if out is None and not none_allowed:
        raise SignatureError(
            f"{label} returned None, so there is nothing to compute. Return its tensors; name "
            "arguments that it updates in place in inplace_argnums; or wrap it with "
            "side_effects=True if it is called for its effect alone."
        )
    leaves, treedef = flatten_result(out, label)
    return Result(treedef, tuple(_describe_leaf(path, t, label) for path, t in leaves))


def _describe_leaf(path: str, t: Tensor, label: str) -> ResultLeaf:
    if t.layout is not torch.strided:
        raise SignatureError(
            f"{label} returned a sparse tensor ({t.layout}) as {path}; JAX arrays are dense: "
            "return its .to_dense(), or its indices and values."
        )
    if t.device.type == "meta":
        raise SignatureError(f"{label} returned a tensor without data as {path}: it is on 'meta'.")
    if t.is_nested:
        raise SignatureError(f"{label} returned a nested tensor as {path}; return padded tensors.")
    if not all(isinstance(n, int) for n in t.shape):
        raise ShapeDependsOnValues
    try:
        dtype = np.dtype(canonical(t.dtype))
    except UnsupportedDtypeError as error:
        raise UnsupportedDtypeError(f"{path} of {label}: {error}") from None
    return ResultLeaf(path, tuple(t.shape), t.dtype, dtype)


SINGLE = jax.tree.structure(0)


def collector(result: Result, label: str) -> Callable[[Any], Tensors]:
    """Return a function from what ``fn`` returns to a flat tuple of tensors."""
    met = result.treedef  # fn returned this structure last
    single = met == SINGLE

    def collect(out: Any) -> Tensors:
        nonlocal met
        if single and isinstance(out, Tensor):
            return (out,)
        leaves, treedef = tree_flatten(out)
        if treedef == met and all(isinstance(t, Tensor) for t in leaves):
            return tuple(leaves)
        labelled, treedef = flatten_result(out, label)
        _check_structure(treedef, result, label)
        met = treedef
        return tuple(t for _, t in labelled)

    return collect


def _check_structure(got: Any, result: Result, label: str) -> None:
    expected = result.treedef
    if got == expected or (result.declared and _with_tuples(got) == _with_tuples(expected)):
        return
    raise SignatureError(
        f"{label} returned another structure than when it was traced: got {got}, expected "
        f"{expected}. A result's structure may depend on shapes, dtypes and static arguments "
        "only; output_shapes= must describe it where it is given."
    )


def _with_tuples(treedef: Any) -> Any:
    """Return the structure with tuples for lists; ``output_shapes=`` does not tell them apart."""

    def convert(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: tuple(map(convert, x)) if type(x) is list else x,
            tree,
            is_leaf=lambda x: type(x) is list,
        )

    return jax.tree.structure(convert(treedef.unflatten(range(treedef.num_leaves))))


def declared_result(shapes: Any, operands: Iterable[np.dtype[Any]], label: str) -> Result:
    """Return the result that ``output_shapes=`` describes, for operands of these dtypes.

    Leaves are ``jax.ShapeDtypeStruct``, arrays, tensors, tracers (their avals), or ``torch.Size``.
    The dtype of the latter is the result type of the floating operands, or else the default float
    dtype.
    """
    inexact = [d for d in operands if jax.numpy.issubdtype(d, jax.numpy.inexact)]
    paths, treedef = tree_flatten_with_path(shapes)
    leaves = []
    for path, x in paths:
        where = f"result{keystr(path)}"
        if isinstance(x, torch.Size):
            try:
                default = jax.numpy.result_type(*(inexact or [float]))
            except ValueError as error:
                # JAX raises TypePromotionError for float8 with anything else.
                raise SignatureError(
                    f"output_shapes of {label} has a bare shape at {where}, and the dtypes of the "
                    f"operands have no result type; give a jax.ShapeDtypeStruct: {error}"
                ) from None
            shape, dtype = tuple(x), np.dtype(default)
            torch_dtype = dtype_j2t(dtype)
        elif isinstance(x, torch.Tensor) or (hasattr(x, "shape") and hasattr(x, "dtype")):
            try:
                shape, dtype = leaf_aval(x)
                torch_dtype = x.dtype if isinstance(x, torch.Tensor) else dtype_j2t(dtype)
            except UnsupportedDtypeError as error:
                raise UnsupportedDtypeError(f"output_shapes of {label}, {where}: {error}") from None
        else:
            raise SignatureError(
                f"output_shapes of {label} has {x!r} at {where}; give a jax.ShapeDtypeStruct, an "
                "array, a tensor or a torch.Size (torch2jax.Size) for every tensor of the result."
            )
        leaves.append(ResultLeaf(where, shape, torch_dtype, dtype))
    return Result(treedef, tuple(leaves), declared=True)
