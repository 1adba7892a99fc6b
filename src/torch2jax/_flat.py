"""From pytrees to a flat torch function, and its result back to a pytree."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from jax.tree_util import keystr, tree_flatten, tree_flatten_with_path

from ._dtypes import NARROWED, canonical, dtype_j2t, x64_enabled
from ._errors import SignatureError, UnsupportedDtypeError
from ._infer import ShapeDependsOnValues

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


class Static:
    """A static argument as a leaf; equal where type and value are."""

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


@dataclass(frozen=True)
class Arguments:
    """How flat operands become the arguments of ``fn``.

    ``statics`` are (leaf index, static value) pairs; the other leaves are operands in order.
    ``casts`` gives operands another dtype before ``fn`` sees them; ``copies`` are the operands that
    ``fn`` changes undeclared and gets as private copies.
    """

    treedef: Any
    statics: tuple[tuple[int, Static], ...]
    labels: tuple[str, ...]
    casts: tuple[tuple[int, torch.dtype], ...] = ()
    copies: tuple[int, ...] = ()

    def unflatten(self, operands: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` from operands."""
        leaves = list(operands)
        for i, static in self.statics:  # in ascending order
            leaves.insert(i, static.value)
        return self.treedef.unflatten(leaves)

    def prepare(self, operands: Tensors) -> Tensors:
        """Operands as ``fn`` gets them."""
        if not self.casts and not self.copies:
            return operands
        xs = list(operands)
        for i, dtype in self.casts:
            xs[i] = xs[i].to(dtype)
        for i in self.copies:
            xs[i] = xs[i].clone()
        return tuple(xs)

    def applied(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn`` as a function of prepared operands, which returns what ``fn`` returns."""
        args, kwargs = self.unflatten([_HOLE] * len(self.labels))
        positional = not kwargs and not self.statics and all(a is _HOLE for a in args)
        if positional:
            return fn

        def call(*operands: Tensor) -> Any:
            args, kwargs = self.unflatten(operands)
            return fn(*args, **kwargs)

        return call


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
        if isinstance(x, tuple):  # torch.return_types, which pytrees do not know
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


def flat_function(
    fn: Callable[..., Any],
    arguments: Arguments,
    result: Result,
    label: str,
    inplace: Sequence[int] = (),
) -> tuple[Callable[..., Tensors], Callable[..., Tensors] | None, Bare | None]:
    """``(pure, run, bare)``: ``fn`` from flat operands to a tuple of tensors in JAX's dtypes.

    With ``inplace`` operands, the tuple ends with their updated values; ``pure`` works on copies of
    them, ``run`` on the operands themselves. ``run`` is None where it is ``pure``. ``bare`` is
    there where ``fn`` takes the operands as they are and returns one tensor.
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

    def forward(operands: Tensors) -> Tensors:
        xs = arguments.prepare(operands)
        leaves = collect(call(*xs))
        # An operand that reached fn in another dtype comes back in its own.
        return (*leaves, *(xs[i].to(operands[i].dtype) for i in inplace))

    def pure(*operands: Tensor) -> Tensors:
        xs = tuple(x.clone() if i in inplace else x for i, x in enumerate(operands))
        return _cast(forward(xs), casts)

    def run(*operands: Tensor) -> Tensors:
        leaves = forward(operands)
        for i in narrowed:
            leaf = result.leaves[i]
            _check_range(leaves[i], dtype_j2t(leaf.dtype), leaf.label, label)
        return _cast(leaves, casts)

    if casts or inplace:
        return pure, run if inplace or narrowed else None, None
    if arguments.casts or arguments.copies:
        return (lambda *operands: forward(operands)), None, None
    bare = (call, collect) if result.treedef == _SINGLE else None
    return (lambda *operands: collect(call(*operands))), None, bare


Bare = tuple[Callable[..., Any], Callable[[Any], Tensors]]

_SINGLE = jax.tree.structure(0)


def _collector(result: Result, label: str) -> Callable[[Any], Tensors]:
    """A function from what ``fn`` returns to a flat tuple of tensors."""
    met = result.treedef  # the structure that fn returned last
    single = met == _SINGLE

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
    """The structure with tuples for its lists, which ``output_shapes=`` does not tell apart."""

    def convert(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: tuple(map(convert, x)) if type(x) is list else x,
            tree,
            is_leaf=lambda x: type(x) is list,
        )

    return jax.tree.structure(convert(treedef.unflatten(range(treedef.num_leaves))))


def _cast(leaves: Tensors, casts: Sequence[tuple[int, torch.dtype]]) -> Tensors:
    out = list(leaves)
    for i, dtype in casts:
        if out[i].dtype is _WIDE[dtype]:
            out[i] = out[i].to(dtype)
    return tuple(out)


_WIDE = {narrow: wide for wide, narrow in NARROWED.items()}
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
    label: str,
) -> Callable[..., Tensors]:
    """``run`` for a function that writes its results into ``out_arg``: XLA's own buffers."""
    collect = _collector(result, label)

    def run(*operands: Tensor) -> Tensors:
        n = len(operands) - len(result.leaves)
        outputs = operands[n:]
        buffers = result.treedef.unflatten(outputs)
        call = arguments.applied(functools.partial(fn, **{out_arg: buffers}))
        returned = call(*arguments.prepare(operands[:n]))
        return outputs if returned is None else collect(returned)

    return run


def with_buffers(fn: Callable[..., Any], out_arg: str, result: Result) -> Callable[..., Any]:
    """``fn``, which must be given ``out_arg``, as a function that allocates its results."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = [x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = given[0].device if given else None
        buffers = result.treedef.unflatten(
            [torch.empty(r.shape, dtype=dtype_j2t(r.dtype), device=device) for r in result.leaves]
        )
        returned = fn(*args, **kwargs, **{out_arg: buffers})
        return buffers if returned is None else returned

    return call
