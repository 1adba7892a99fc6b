"""``out_specs=``: a call on every shard of its operands, by ``jax.shard_map``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import PartitionSpec

from ._errors import SignatureError
from ._flat import Result
from ._options import Config
from ._signature import prefix_leaves

_EXPLICIT = jax.sharding.AxisType.Explicit
_MANUAL = jax.sharding.AxisType.Manual


class Shards:
    """How one call is split: its mesh, and the spec of each operand."""

    def __init__(
        self,
        config: Config,
        given: Mapping[int, Any] | None,
        operands: Sequence[Any],
        labels: Sequence[str],
        label: str,
    ) -> None:
        self.config, self.label = config, label
        mesh = config.mesh
        if mesh is None:
            mesh = _mesh_of(operands) or jax.sharding.get_abstract_mesh()
        if mesh.empty:
            raise SignatureError(
                f"{label} is wrapped with out_specs= and called without a mesh: pass mesh=, enter "
                "jax.set_mesh(mesh), or shard an argument over explicit axes."
            )
        self.mesh = mesh
        manual = _axes(mesh, _MANUAL) | _axes(jax.sharding.get_abstract_mesh(), _MANUAL)
        self.axes = frozenset(mesh.axis_names) - manual
        """Axes over which the call is split; none where it is on a shard already."""
        explicit = _axes(mesh, _EXPLICIT)
        if given is None and self.axes and not self.axes & explicit:
            raise SignatureError(
                f"{label} is wrapped with out_specs= and without in_specs=, and the axes "
                f"{sorted(self.axes)} of the mesh are automatic, so that types do not say how the "
                "arguments are sharded: give in_specs=, or make the axes explicit (jax.make_mesh)."
            )
        for spec in jax.tree.leaves(config.out_specs):
            if not isinstance(spec, PartitionSpec):
                raise SignatureError(
                    f"out_specs of {label} has {spec!r}; give a jax.P for every result."
                )
        self.specs = [
            (given or {}).get(i) or _typed_spec(jax.typeof(x)) for i, x in enumerate(operands)
        ]
        for spec, where in zip(self.specs, labels, strict=False):
            if not isinstance(spec, PartitionSpec):
                raise SignatureError(
                    f"in_specs of {label} has {spec!r} for {where}; give a jax.P, or None for what "
                    "the argument's type says."
                )

    def result(self, whole: Result, inplace: bool) -> Result:
        """The result on one shard, from that of the whole call, which ``output_shapes`` gives."""
        specs = self.config.out_specs
        if inplace and isinstance(specs, tuple | list) and not isinstance(specs, PartitionSpec):
            specs = specs[0]  # the others are of the updated arguments
        tree = whole.treedef.unflatten(list(range(len(whole.leaves))))
        leaves = tuple(
            replace(leaf, shape=self._on_shard(leaf.label, leaf.shape, spec))
            for leaf, spec in zip(
                whole.leaves, prefix_leaves(specs, tree, "out_specs", self.label), strict=True
            )
        )
        return replace(whole, leaves=leaves)

    def _on_shard(self, where: str, shape: tuple[int, ...], spec: Any) -> tuple[int, ...]:
        local = list(shape)
        for d, axes in enumerate(spec):
            for axis in axes if isinstance(axes, tuple) else (axes,):
                if axis is None:
                    continue
                size = self.mesh.shape.get(axis, 0)
                if d >= len(local) or not size or local[d] % size:
                    raise SignatureError(
                        f"{where} of {self.label} has the shape {shape} in output_shapes, which "
                        f"{spec} does not split evenly over the mesh {dict(self.mesh.shape)}."
                    )
                local[d] //= size
        return tuple(local)

    def own_key(self, rng: Any) -> Any:
        """The key of a shard: shards of different operands draw different numbers."""
        for axis in sorted({axis for spec in self.specs for axis in _names(spec)} & self.axes):
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis))
        return rng

    def map(self, local: Callable[..., Any], operands: Sequence[Any]) -> Any:
        """``local`` on every shard."""
        if not self.axes:
            return local(*operands)
        mapped = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=tuple(self.specs),
            out_specs=self.config.out_specs,
            axis_names=set(self.axes),
        )
        return mapped(*operands)


def check_whole(avals: Sequence[Any], labels: Sequence[str], label: str) -> None:
    """Raise where an operand is sharded over explicit axes: a call would gather it."""
    for aval, where in zip(avals, labels, strict=False):
        sharded = sorted(_names(_typed_spec(aval)))
        if sharded:
            axes = ", ".join(map(repr, sharded))
            raise SignatureError(
                f"{where} of {label} is {aval.str_short(True)}, sharded over the explicit mesh "
                f"axes {axes}, and nothing says how the result is. To run on every shard, write "
                f"torch2jax(fn, out_specs=jax.P({axes})), with the spec of the result; to run on "
                "the whole, gather it first: jax.sharding.reshard(x, jax.P())."
            )


def _typed_spec(aval: Any) -> PartitionSpec:
    """The explicit axes over which a value of this aval is sharded."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or not _axes(sharding.mesh, _EXPLICIT) & _names(sharding.spec):
        return PartitionSpec()
    return sharding.spec


def _names(spec: PartitionSpec) -> set[str]:
    return {
        axis
        for axes in spec
        for axis in (axes if isinstance(axes, tuple) else (axes,))
        if isinstance(axis, str)
    }


def _axes(mesh: Any, kind: Any) -> frozenset[str]:
    return frozenset(
        name for name, type in zip(mesh.axis_names, mesh.axis_types, strict=True) if type == kind
    )


def _mesh_of(operands: Sequence[Any]) -> Any:
    for x in operands:
        sharding = getattr(jax.typeof(x), "sharding", None)
        if sharding is not None and not sharding.mesh.empty:
            return sharding.mesh
    return None
