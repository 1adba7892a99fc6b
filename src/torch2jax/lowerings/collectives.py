"""Functional collectives of torch.distributed are JAX's, over an axis of ``shard_map``.

A group stands for an axis of the mesh: the one that has the group's name, or else the axis
"torch_dist", or else the only axis over which the function is mapped. Ranks are positions along it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._errors import SignatureError
from .registry import lowering_by_name

DEFAULT_AXIS = "torch_dist"
_SPACE = "_c10d_functional::"


def _axis(group: Any, group_size: int | None = None) -> str | None:
    """Return the axis of a group; None for a group of one where no function is mapped."""
    name = getattr(group, "group_name", group)
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(mesh.manual_axes)
    if name in axes:
        axis = name
    elif DEFAULT_AXIS in axes:
        axis = DEFAULT_AXIS
    elif len(axes) == 1:
        axis = axes[0]
    elif not axes and (_size(name) if group_size is None else group_size) == 1:
        return None
    else:
        raise SignatureError(
            f"a collective over the group {name!r} needs an axis of a mesh: call it inside of "
            f"device.shard_map or torchax.interop.jax_shard_map, with the name of an axis as the "
            f'group, or with one axis, or with an axis "{DEFAULT_AXIS}"; mapped axes: {axes}.'
        )
    if group_size is not None and group_size != mesh.shape[axis]:
        raise SignatureError(
            f"a collective over a group of {group_size} ranks runs over the axis {axis!r} of "
            f"{mesh.shape[axis]} devices: the group must have one rank for each of them."
        )
    return axis


def _size(name: Any) -> int:
    """Return the number of ranks of a group that torch.distributed knows, else 0."""
    from torch.distributed import distributed_c10d

    try:
        return distributed_c10d._get_group_size_by_name(name)
    except (RuntimeError, ValueError):
        return 0


def _reduced(x: Any, reduce_op: str, axis: str) -> Any:
    if reduce_op == "sum":
        return jax.lax.psum(x, axis)
    if reduce_op == "avg":
        return jax.lax.pmean(x, axis)
    if reduce_op == "max":
        return jax.lax.pmax(x, axis)
    if reduce_op == "min":
        return jax.lax.pmin(x, axis)
    if reduce_op == "product":
        return jnp.prod(jax.lax.all_gather(x, axis), 0, dtype=x.dtype)
    raise NotImplementedError(f"a reduction {reduce_op!r} over devices has no counterpart in JAX")


@lowering_by_name(_SPACE + "all_reduce")
def all_reduce(input: Any, reduce_op: str, group_name: Any) -> Any:
    axis = _axis(group_name)
    return input if axis is None else _reduced(input, reduce_op.lower(), axis)


@lowering_by_name(_SPACE + "all_reduce_coalesced")
def all_reduce_coalesced(inputs: Sequence[Any], reduce_op: str, group_name: Any) -> list[Any]:
    return [all_reduce(x, reduce_op, group_name) for x in inputs]


@lowering_by_name(_SPACE + "all_gather_into_tensor")
def all_gather_into_tensor(input: Any, group_size: int, group_name: Any) -> Any:
    axis = _axis(group_name, group_size)
    return input if axis is None else jax.lax.all_gather(input, axis, tiled=True)


@lowering_by_name(_SPACE + "all_gather_into_tensor_coalesced")
def all_gather_into_tensor_coalesced(
    inputs: Sequence[Any], group_size: int, group_name: Any
) -> list[Any]:
    return [all_gather_into_tensor(x, group_size, group_name) for x in inputs]


@lowering_by_name(_SPACE + "reduce_scatter_tensor")
def reduce_scatter_tensor(input: Any, reduce_op: str, group_size: int, group_name: Any) -> Any:
    axis = _axis(group_name, group_size)
    if axis is None:
        return input
    if input.shape[0] % group_size:
        raise ValueError(f"{input.shape[0]} rows cannot be scattered over {group_size} ranks")
    reduce_op = reduce_op.lower()
    if reduce_op in ("sum", "avg"):
        out = jax.lax.psum_scatter(input, axis, tiled=True)
        return out if reduce_op == "sum" else (out / group_size).astype(input.dtype)
    rows = input.shape[0] // group_size
    whole = _reduced(input, reduce_op, axis)
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(axis) * rows, rows)


@lowering_by_name(_SPACE + "reduce_scatter_tensor_coalesced")
def reduce_scatter_tensor_coalesced(
    inputs: Sequence[Any], reduce_op: str, group_size: int, group_name: Any
) -> list[Any]:
    return [reduce_scatter_tensor(x, reduce_op, group_size, group_name) for x in inputs]


@lowering_by_name(_SPACE + "all_to_all_single")
def all_to_all_single(
    input: Any, output_split_sizes: Sequence[int], input_split_sizes: Sequence[int], group_name: Any
) -> Any:
    sizes = {*output_split_sizes, *input_split_sizes}
    axis = _axis(group_name, len(input_split_sizes))
    if len(sizes) != 1:
        raise NotImplementedError(
            f"all_to_all_single with parts of different sizes, {list(input_split_sizes)} and "
            f"{list(output_split_sizes)}: XLA exchanges equal parts. Pad them."
        )
    return input if axis is None else jax.lax.all_to_all(input, axis, 0, 0, tiled=True)


@lowering_by_name(_SPACE + "broadcast")
def broadcast(input: Any, src: int, group_name: Any) -> Any:
    axis = _axis(group_name)
    if axis is None:
        return input
    # The sum of zeros and one summand is that summand.
    number = input.astype(jnp.int32) if input.dtype == bool else input
    mine = jax.lax.axis_index(axis) == src
    return jax.lax.psum(jnp.where(mine, number, jnp.zeros_like(number)), axis).astype(input.dtype)


@lowering_by_name(_SPACE + "wait_tensor")
@lowering_by_name(_SPACE + "_wrap_tensor_autograd")
def wait_tensor(tensor: Any) -> Any:
    """Return the tensor: JAX's arrays wait by themselves."""
    return tensor
