"""``torch.distributed``'s functions that write to tensors are its functional collectives here.

Inside of ``device.shard_map`` a group stands for an axis; see ``lowerings/collectives.py``. The
results are there when the program runs, so each work is done at once.
"""

from __future__ import annotations

from typing import Any

import torch

from ...._compat.torch import finished_work, group_name, group_size, reduction
from .table import special


def _op(name: str) -> Any:
    """Return an operator; None where PyTorch was built without ``torch.distributed``."""
    return getattr(getattr(torch.ops.c10d, name, None), "default", None)


_functional: Any = torch.ops._c10d_functional


@special(_op("allreduce_"), _op("allreduce_coalesced_"))
def _all_reduce(args: Any, kwargs: Any) -> Any:
    tensors, group, kind = args[:3]
    name = group_name(group)
    for x in tensors:
        x.copy_(_functional.all_reduce(x, reduction(kind), name))
    return tensors, finished_work()


@special(_op("broadcast_"))
def _broadcast(args: Any, kwargs: Any) -> Any:
    tensors, group, root = args[:3]
    name = group_name(group)
    for x in tensors:
        x.copy_(_functional.broadcast(x, root, name))
    return tensors, finished_work()


@special(_op("_allgather_base_"))
def _all_gather_into_tensor(args: Any, kwargs: Any) -> Any:
    out, x, group = args[:3]
    # The rows may stand one below the other, or each in a row of its own.
    ranks = out.numel() // max(x.numel(), 1)
    gathered = _functional.all_gather_into_tensor(x.reshape(-1), ranks, group_name(group))
    out.copy_(gathered.reshape(out.shape))
    return out, finished_work()


@special(_op("allgather_"))
def _all_gather(args: Any, kwargs: Any) -> Any:
    outs, inputs, group = args[:3]
    name = group_name(group)
    for parts, x in zip(outs, inputs, strict=True):
        gathered = _functional.all_gather_into_tensor(x[None], len(parts), name)
        for part, row in zip(parts, gathered, strict=True):
            part.copy_(row)
    return outs, finished_work()


@special(_op("_reduce_scatter_base_"))
def _reduce_scatter_tensor(args: Any, kwargs: Any) -> Any:
    out, x, group, kind = args[:4]
    ranks = x.numel() // max(out.numel(), 1)
    rows = x.reshape(ranks, -1)
    own = _functional.reduce_scatter_tensor(rows, reduction(kind), ranks, group_name(group))
    out.copy_(own.reshape(out.shape))
    return out, finished_work()


@special(_op("reduce_scatter_"))
def _reduce_scatter(args: Any, kwargs: Any) -> Any:
    outs, inputs, group, kind = args[:4]
    name, kind = group_name(group), reduction(kind)
    for out, parts in zip(outs, inputs, strict=True):
        own = _functional.reduce_scatter_tensor(torch.stack(parts), kind, len(parts), name)
        out.copy_(own[0])
    return outs, finished_work()


@special(_op("alltoall_base_"))
def _all_to_all_single(args: Any, kwargs: Any) -> Any:
    out, x, group, out_sizes, sizes = args[:5]
    name = group_name(group)
    if not (out_sizes and sizes):
        ranks = group_size(group)
        out_sizes, sizes = ([len(y) // ranks] * ranks for y in (out, x))
    out.copy_(_functional.all_to_all_single(x, out_sizes, sizes, name))
    return finished_work()


@special(_op("alltoall_"))
def _all_to_all(args: Any, kwargs: Any) -> Any:
    outs, inputs, group = args[:3]
    ones = [1] * len(inputs)
    exchanged = _functional.all_to_all_single(torch.stack(inputs), ones, ones, group_name(group))
    for out, row in zip(outs, exchanged, strict=True):
        out.copy_(row)
    return outs, finished_work()


def _refuse(name: str, instead: str) -> None:
    @special(_op(name))
    def refuse(args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(
            f'torch.distributed.{name.rstrip("_")} on device "jax": all devices run one program, '
            f"in which none has a part of its own. Use {instead}."
        )


_refuse("reduce_", "all_reduce")
_refuse("gather_", "all_gather")
_refuse("scatter_", "broadcast and each device's own rows, or reduce_scatter_tensor")
for _name in ("send", "recv_", "recv_any_source_"):
    _refuse(_name, "all_to_all_single, or jax.lax.ppermute in device.call_jax")
