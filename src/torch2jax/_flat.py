"""From pytrees to a flat torch function, and its result back to a pytree."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from jax.tree_util import keystr, tree_flatten_with_path

from ._convert import canonical, dtype_j2t, x64_enabled
from ._errors import SignatureError, UnsupportedDtypeError

Tensor = torch.Tensor
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class ResultLeaf:
    """One tensor of a result: its path, shape, and dtype in torch and in JAX."""

    label: str
    shape: tuple[int, ...]
    torch_dtype: torch.dtype
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Result:
    """The structure of a result."""

    treedef: Any
    leaves: tuple[ResultLeaf, ...]
    declared: bool = False
    """By ``output_shapes=``, rather than inferred."""


@dataclass(frozen=True)
class Arguments:
    """How flat operands become the arguments of ``fn``.

    ``statics`` are (leaf index, value) pairs; the other leaves are operands in order. ``casts``
    gives operands another dtype before ``fn`` sees them; ``copies`` are the operands that ``fn``
    changes undeclared and gets as private copies.
    """

    treedef: Any
    statics: tuple[tuple[int, Any], ...]
    labels: tuple[str, ...]
    casts: tuple[tuple[int, torch.dtype], ...] = ()
    copies: tuple[int, ...] = ()

    def unflatten(self, operands: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` from operands."""
        leaves = list(operands)
        for i, value in self.statics:  # in ascending order
            leaves.insert(i, value)
        return self.treedef.unflatten(leaves)

    def applied(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn`` as a function of flat operands, which returns what ``fn`` returns."""
        args, kwargs = self.unflatten([_HOLE] * len(self.labels))
        positional = not kwargs and not self.statics and all(a is _HOLE for a in args)
        if positional:
            call = fn
        else:

            def call(*operands: Tensor) -> Any:
                args, kwargs = self.unflatten(operands)
                return fn(*args, **kwargs)

        if not self.casts and not self.copies:
            return call

        def prepared(*operands: Tensor) -> Any:
            xs = list(operands)
            for i, dtype in self.casts:
                xs[i] = xs[i].to(dtype)
            for i in self.copies:
                xs[i] = xs[i].clone()
            return call(*xs)

        return prepared


_HOLE = object()


def flatten_result(out: Any, label: str) -> tuple[list[tuple[str, Tensor]], Any]:
    """Paths and tensors of a result, and its treedef.

    Mappings that JAX does not know become dicts, Python numbers 0-d tensors. Anything else that is
    not a tensor is an error with its path.
    """
    paths, treedef = tree_flatten_with_path(_plain(out, "result", label))
    return [(f"result{keystr(path)}", leaf) for path, leaf in paths], treedef


def _plain(out: Any, where: str, label: str) -> Any:
    """``out`` with dicts for unknown mappings and tensors for numbers."""

    def leaf(path: Any, x: Any) -> Any:
        if isinstance(x, Tensor):
            return x
        here = where + keystr(path)
        if isinstance(x, Mapping):
            return {k: _plain(v, f"{here}[{k!r}]", label) for k, v in x.items()}
        if isinstance(x, bool | int | float | complex | np.generic):
            return torch.as_tensor(x)
        remedy = (
            "convert it to a tensor with torch.from_numpy"
            if isinstance(x, np.ndarray)
            else "return tensors, numbers, None, or dicts, lists, tuples and registered pytrees "
            "of them"
        )
        path_text = here.removeprefix("result") or "its result"
        raise SignatureError(
            f"{label} returned something that has no JAX counterpart: {path_text}: "
            f"{type(x).__name__}; {remedy}."
        )

    return jax.tree_util.tree_map_with_path(leaf, out)


def describe_result(out: Any, label: str, none_allowed: bool) -> Result:
    """The structure of what ``fn`` returned at trace time."""
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
    if t.is_nested:
        raise SignatureError(f"{label} returned a nested tensor as {path}; return padded tensors.")
    try:
        dtype = np.dtype(canonical(t.dtype))
    except UnsupportedDtypeError as error:
        raise UnsupportedDtypeError(f"{path} of {label}: {error}") from None
    return ResultLeaf(path, tuple(t.shape), t.dtype, dtype)


def flat_function(
    fn: Callable[..., Any],
    arguments: Arguments,
    result: Result,
    label: str,
    inplace: Sequence[int] = (),
) -> tuple[Callable[..., Tensors], Callable[..., Tensors] | None]:
    """``(pure, run)``: ``fn`` from flat operands to a tuple of tensors in JAX's dtypes.

    With ``inplace`` operands, the tuple ends with their updated values; ``pure`` works on copies of
    them, ``run`` on the operands themselves. ``run`` is None where it is ``pure``.
    """
    call = arguments.applied(fn)
    collect = _collector(result, label)
    # Where a result was inferred, its torch dtype is known; a declared one may come wide.
    casts = [
        (i, dtype)
        for i, leaf in enumerate(result.leaves)
        if (dtype := dtype_j2t(leaf.dtype)) in _WIDE
        and not x64_enabled()
        and (result.declared or leaf.torch_dtype is not dtype)
    ]
    narrowed = [i for i, dtype in casts if not (dtype.is_floating_point or dtype.is_complex)]

    def updating(*operands: Tensor) -> Tensors:
        leaves = collect(call(*operands)) if inplace else ()
        return (*leaves, *(operands[i] for i in inplace))

    def pure(*operands: Tensor) -> Tensors:
        if inplace:
            xs = [x.clone() if i in inplace else x for i, x in enumerate(operands)]
            return _cast(updating(*xs), casts)
        return _cast(collect(call(*operands)), casts)

    def run(*operands: Tensor) -> Tensors:
        leaves = updating(*operands) if inplace else collect(call(*operands))
        for i in narrowed:
            _check_range(
                leaves[i], dtype_j2t(result.leaves[i].dtype), result.leaves[i].label, label
            )
        return _cast(leaves, casts)

    if not casts and not inplace:
        if result.treedef == _SINGLE:
            return _single(call, label), None
        return (lambda *operands: collect(call(*operands))), None
    return pure, run if inplace or narrowed else None


_SINGLE = jax.tree.structure(0)


def _single(call: Callable[..., Any], label: str) -> Callable[..., Tensors]:
    """The commonest case, with nothing in its way: one tensor."""

    def single(*operands: Tensor) -> Tensors:
        out = call(*operands)
        if isinstance(out, Tensor):
            return (out,)
        return (_only(flatten_result(out, label), _SINGLE, label),)

    return single


def _only(flat: tuple[list[tuple[str, Tensor]], Any], expected: Any, label: str) -> Tensor:
    leaves, treedef = flat
    _check_structure(treedef, expected, label)
    return leaves[0][1]


def _collector(result: Result, label: str) -> Callable[[Any], Tensors]:
    """A function from what ``fn`` returns to a flat tuple of tensors."""

    def collect(out: Any) -> Tensors:
        if isinstance(out, Tensor) and result.treedef == _SINGLE:
            return (out,)
        leaves, treedef = flatten_result(out, label)
        _check_structure(treedef, result.treedef, label)
        return tuple(t for _, t in leaves)

    return collect


def _check_structure(got: Any, expected: Any, label: str) -> None:
    if got != expected:
        raise SignatureError(
            f"{label} returned another structure than when it was traced: got {got}, expected "
            f"{expected}. A result's structure may depend on shapes, dtypes and static arguments "
            "only; output_shapes= must describe it where it is given."
        )


def _cast(leaves: Tensors, casts: Sequence[tuple[int, torch.dtype]]) -> Tensors:
    out = list(leaves)
    for i, dtype in casts:
        if out[i].dtype is _WIDE[dtype]:
            out[i] = out[i].to(dtype)
    return tuple(out)


_WIDE = {
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
    torch.int32: torch.int64,
    torch.uint32: torch.uint64,
}
"""With x64 off, the torch dtype that JAX carries as this one."""


def _check_range(t: Tensor, dtype: torch.dtype, path: str, label: str) -> None:
    """64-bit integers that become 32-bit must fit; checked where no device must be waited for."""
    if t.device.type != "cpu" or t.numel() == 0 or t.dtype is not _WIDE[dtype]:
        return
    low, high = (int(x) for x in torch.aminmax(t))
    info = torch.iinfo(dtype)
    if low < info.min or high > info.max:
        raise OverflowError(
            f"{path} of {label} holds {low if low < info.min else high}, which does not fit "
            f'{dtype}; jax.config.update("jax_enable_x64", True) keeps 64-bit integers.'
        )


def out_function(
    fn: Callable[..., Any],
    arguments: Arguments,
    result: Result,
    out_arg: str,
) -> Callable[..., Tensors]:
    """``run`` for a function that writes its results into ``out_arg``: XLA's own buffers."""

    def run(*operands: Tensor) -> Tensors:
        n = len(operands) - len(result.leaves)
        outputs = operands[n:]
        call = arguments.applied(
            functools.partial(fn, **{out_arg: result.treedef.unflatten(outputs)})
        )
        call(*operands[:n])
        return outputs

    return run
