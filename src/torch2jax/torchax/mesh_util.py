"""``Mesh`` shards models, under torchax's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import torch
from jax.sharding import PartitionSpec

from ..device.sharding import shard_module, sharded_init

__all__ = ["Mesh", "SingleAxisSharder"]

Sharder = Callable[[str, jax.ShapeDtypeStruct], PartitionSpec]


class SingleAxisSharder:
    """A sharder splits the first dimension of a tensor that an axis of the mesh divides.

    Args:
      axis_name: the name of the axis.
      axis_size: its number of devices.
      replicate_unshardable: whether a tensor without such a dimension is put on every device.
        Otherwise such a tensor raises an ``AssertionError``.
    """

    def __init__(self, axis_name: str, axis_size: int, replicate_unshardable: bool = False) -> None:
        self.axis_name, self.axis_size = axis_name, axis_size
        self.replicate_unshardable = replicate_unshardable

    def __call__(self, name: str, shapedtype: Any) -> PartitionSpec:
        shape = tuple(shapedtype.shape)
        for dim, size in enumerate(shape):
            if size % self.axis_size == 0:
                rest = [None] * (len(shape) - dim - 1)
                return PartitionSpec(*[None] * dim, self.axis_name, *rest)
        if not self.replicate_unshardable:
            raise AssertionError(
                f"{name} {tuple(shapedtype.shape)} has no dimension that {self.axis_size} devices "
                f"of {self.axis_name!r} divide; replicate_unshardable=True puts it on every one."
            )
        return PartitionSpec(*[None] * len(shape))


class Mesh:
    """A mesh joins a JAX mesh and a rule that splits the tensors of a model over it.

    Args:
      jax_mesh: a ``jax.sharding.Mesh``.
      sharder: ``(name, shape and dtype) -> PartitionSpec``. A mesh of one axis has by default a
        ``SingleAxisSharder``, which replicates what it cannot split.
    """

    def __init__(self, jax_mesh: jax.sharding.Mesh, sharder: Sharder | None = None) -> None:
        if sharder is None and len(jax_mesh.axis_names) == 1:
            sharder = SingleAxisSharder(jax_mesh.axis_names[0], jax_mesh.size, True)
        self.jax_mesh, self._sharder = jax_mesh, sharder

    @classmethod
    def fsdp_mesh(cls, axis_name: str = "fsdp") -> Mesh:
        """Make a mesh of all devices along one axis, over which each tensor is split."""
        return cls(jax.make_mesh((len(jax.devices()),), (axis_name,)))

    def initialize_model_sharded(
        self,
        model_class: Callable[..., torch.nn.Module],
        init_args: Sequence[Any],
        init_kwargs: Mapping[str, Any] | None = None,
        override_sharder: Sharder | None = None,
    ) -> torch.nn.Module:
        """Make ``model_class(*init_args, **init_kwargs)``, which is never whole on one device."""
        return sharded_init(
            lambda: model_class(*init_args, **(init_kwargs or {})),
            self.jax_mesh,
            self._rule(override_sharder),
        )

    def shard_model(
        self, model: torch.nn.Module, override_sharder: Sharder | None = None
    ) -> torch.nn.Module:
        """Move a model to device jax and split its tensors, in place."""
        return shard_module(model, self.jax_mesh, self._rule(override_sharder))

    def _rule(self, override: Sharder | None) -> Sharder:
        rule = override or self._sharder
        if rule is None:
            raise ValueError(
                f"a mesh of the axes {self.jax_mesh.axis_names} needs a sharder: a function "
                "(name, shape and dtype) -> PartitionSpec."
            )
        return rule
