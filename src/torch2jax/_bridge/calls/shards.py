"""With ``out_specs=`` a call runs on every shard of its operands, by ``jax.shard_map``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import PartitionSpec

from ..._errors import SignatureError
from ..jax_side.sharded_types import EXPLICIT, MANUAL, axes_of, axes_of_type, typed_spec
from .checks import prefix_leaves
from .options import Options
from .results import Result


class Shards:
    """A mesh and the spec of each operand say how one call is split."""

    def __init__(
        self,
        options: Options,
        given: Mapping[int, Any] | None,
        operands: Sequence[Any],
        labels: Sequence[str],
        label: str,
    ) -> None:
        self.options, self.label = options, label
        mesh = options.mesh
        if mesh is None:
            mesh = _mesh_of(operands) or jax.sharding.get_abstract_mesh()
        if mesh.empty:
            raise SignatureError(
                f"{label} is wrapped with out_specs= and called without a mesh: pass mesh=, enter "
                "jax.set_mesh(mesh), or shard an argument over explicit axes."
            )
        self.mesh = mesh
        manual = axes_of_type(mesh, MANUAL) | axes_of_type(jax.sharding.get_abstract_mesh(), MANUAL)
        self.axes = frozenset(mesh.axis_names) - manual
        """The call is split over these axes; there are none where it is on a shard already."""
        explicit = axes_of_type(mesh, EXPLICIT)
        if given is None and self.axes and not self.axes & explicit:
            raise SignatureError(
                f"{label} is wrapped with out_specs= and without in_specs=, and the axes "
                f"{sorted(self.axes)} of the mesh are automatic, so that types do not say how the "
                "arguments are sharded: give in_specs=, or make the axes explicit (jax.make_mesh)."
            )
        for spec in jax.tree.leaves(options.out_specs):
            if not isinstance(spec, PartitionSpec):
                raise SignatureError(
                    f"out_specs of {label} has {spec!r}; give a jax.P for every result."
                )
        self.specs = [
            (given or {}).get(i) or typed_spec(jax.typeof(x)) for i, x in enumerate(operands)
        ]
        for spec, where in zip(self.specs, labels, strict=False):
            if not isinstance(spec, PartitionSpec):
                raise SignatureError(
                    f"in_specs of {label} has {spec!r} for {where}; give a jax.P, or None for what "
                    "the argument's type says."
                )

    def result(self, whole: Result, inplace: bool) -> Result:
        """Return the result on one shard, where ``whole`` is that of the whole call."""
        specs = self.options.out_specs
        if inplace and isinstance(specs, tuple | list) and not isinstance(specs, PartitionSpec):
            specs = specs[0]  # the others are for the updated arguments
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
        """Return the key of a shard; shards of different operands draw different numbers."""
        for axis in sorted({axis for spec in self.specs for axis in axes_of(spec)} & self.axes):
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis))
        return rng

    def map(self, local: Callable[..., Any], operands: Sequence[Any]) -> Any:
        """Run ``local`` on every shard."""
        if not self.axes:
            return local(*operands)
        mapped = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=tuple(self.specs),
            out_specs=self.options.out_specs,
            axis_names=set(self.axes),
        )
        return mapped(*operands)


def _mesh_of(operands: Sequence[Any]) -> Any:
    for x in operands:
        sharding = getattr(jax.typeof(x), "sharding", None)
        if sharding is not None and not sharding.mesh.empty:
            return sharding.mesh
    return None
