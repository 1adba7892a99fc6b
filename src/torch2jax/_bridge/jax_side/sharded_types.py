"""Types say by explicit mesh axes that a value is sharded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from ..._errors import SignatureError

EXPLICIT = jax.sharding.AxisType.Explicit
MANUAL = jax.sharding.AxisType.Manual


def check_whole(avals: Sequence[Any], labels: Sequence[str], label: str) -> None:
    """Raise where an operand is sharded over explicit axes, because a call would gather it."""
    for aval, where in zip(avals, labels, strict=False):
        sharded = sorted(axes_of(typed_spec(aval)))
        if sharded:
            axes = ", ".join(map(repr, sharded))
            raise SignatureError(
                f"{where} of {label} is {aval.str_short(True)}, sharded over the explicit mesh "
                f"axes {axes}, and nothing says how the result is. To run on every shard, write "
                f"torch2jax(fn, out_specs=jax.P({axes})), with the spec of the result; to run on "
                "the whole, gather it first: jax.sharding.reshard(x, jax.P())."
            )


def typed_spec(aval: Any) -> PartitionSpec:
    """Return the spec by which a value of this aval is sharded over explicit axes."""
    sharding = getattr(aval, "sharding", None)
    if sharding is None or not axes_of_type(sharding.mesh, EXPLICIT) & axes_of(sharding.spec):
        return PartitionSpec()
    return sharding.spec


def axes_of(spec: PartitionSpec) -> set[str]:
    return {
        axis
        for axes in spec
        for axis in (axes if isinstance(axes, tuple) else (axes,))
        if isinstance(axis, str)
    }


def axes_of_type(mesh: Any, kind: Any) -> frozenset[str]:
    return frozenset(
        name for name, type in zip(mesh.axis_names, mesh.axis_types, strict=True) if type == kind
    )
