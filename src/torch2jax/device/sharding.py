"""Tensors are spread over devices by annotations, functions of shards, and sharded models."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import torch
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from .._compat.jax import current_mesh, get_opaque_trace_state
from .._errors import SignatureError
from ..lowerings.promotion import array_dtype
from . import random_streams
from .interop import call_jax, jax_view
from .operators.constants import value_of
from .setup.enable import enable
from .tensors.tensor import Tensor
from .thread_state import state

__all__ = ["mark_sharding", "shard_map", "shard_module", "sharded_init"]

Layout = Mapping[str, PartitionSpec] | Callable[[str, jax.ShapeDtypeStruct], PartitionSpec]


def mark_sharding(x: Any, sharding: Sharding | PartitionSpec, mesh: Mesh | None = None) -> Any:
    """Put a tensor's values on a sharding's devices; in a traced function, ask XLA to do so.

    Args:
      x: a tensor on device "jax". Outside of a traced function a view stays where its memory is.
      sharding: a ``jax.sharding.Sharding``, or a ``PartitionSpec`` over the axes of ``mesh``.
      mesh: a mesh, by default that of ``jax.set_mesh``.

    Returns:
      ``x`` itself, with the same values. Gradients go through it as before.

    Raises:
      SignatureError: for a tensor on another device, or a ``PartitionSpec`` without a mesh.

    >>> import torch, torch2jax, jax
    >>> from jax.sharding import PartitionSpec as P
    >>> torch2jax.device.enable()
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> x = torch2jax.device.mark_sharding(torch.ones(8, 4, device="jax"), P("data", None), mesh)
    >>> tuple(x.jax().sharding.spec)
    ('data', None)
    """
    if not isinstance(x, Tensor):
        raise SignatureError(f"mark_sharding takes a tensor on device jax, got {_what(x)}.")
    sharding = _sharding(sharding, mesh)
    cell = x._cell
    if isinstance(cell.array, Tracer):
        value = jax.lax.with_sharding_constraint(value_of(x), sharding)
        if x._chain is None:
            cell.array = value
        else:  # this view is read as value from now on
            x._memo = (cell.array, get_opaque_trace_state(), value)
        return x
    if x._chain is None:
        cell.array = jax.device_put(cell.array, sharding)
    return x


def _what(x: Any) -> str:
    return f"one on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__


def _sharding(sharding: Any, mesh: Mesh | None) -> Sharding:
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return NamedSharding(_automatic(sharding.mesh), sharding.spec)
    if isinstance(sharding, Sharding):
        return sharding
    if not isinstance(sharding, PartitionSpec):
        raise SignatureError(
            f"a sharding is a jax.sharding.Sharding or a PartitionSpec, got {sharding!r}."
        )
    if mesh is None:
        mesh = current_mesh()
    if mesh.empty:
        raise SignatureError(f"{sharding} names axes of a mesh: give mesh=, or use jax.set_mesh.")
    return NamedSharding(_automatic(mesh), sharding)


def _automatic(mesh: Mesh) -> Mesh:
    """Return the mesh with axes that XLA decides over: PyTorch's operators name no shardings."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def shard_map(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Apply ``jax.shard_map`` to a function of tensors on device "jax".

    Args:
      fn: a function that takes and returns pytrees of tensors, which are one device's shards. It
        calls JAX's collectives by ``call_jax``.
      **options: options of ``jax.shard_map``: ``mesh``, ``in_specs``, ``out_specs``.

    Returns:
      A function of whole tensors, with gradients.

    >>> import torch, torch2jax, jax
    >>> from jax.sharding import PartitionSpec as P
    >>> torch2jax.device.enable()
    >>> def total(x):
    ...     return torch2jax.device.call_jax(jax.lax.psum, x.sum(), "data")
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> f = torch2jax.device.shard_map(total, mesh=mesh, in_specs=P("data"), out_specs=P())
    >>> f(torch.ones(8, device="jax"))
    tensor(8., device='jax:0')
    """
    enable()
    if isinstance(options.get("mesh"), Mesh):
        options["mesh"] = _automatic(options["mesh"])
    inner = jax.jit(jax.shard_map(jax_view(fn), **options))
    return lambda *args, **kwargs: call_jax(inner, *args, **kwargs)


# --- models that start out sharded ---------------------------------------------------------------


def sharded_init(
    make: Callable[[], torch.nn.Module],
    mesh: Mesh,
    layout: Layout | None = None,
    fsdp: str | None = None,
) -> torch.nn.Module:
    """Make a module with sharded parameters, none of which is ever whole on one device.

    Args:
      make: a function without arguments that makes the module, as for any device. It is called
        twice, and its initialisation is compiled to one program. Each device computes its own part
        of that program.
      mesh: a mesh of JAX devices.
      layout: tensor parallelism, as ``{pattern: PartitionSpec}`` or as a function
        ``(name, shape and dtype) -> PartitionSpec``. The first pattern that matches a name, as file
        names match, says how that parameter or buffer is split.
      fsdp: the axis over which each parameter is split besides. It is split in its longest
        dimension that the axis divides and that is not split yet. A parameter without such a
        dimension is on every device.

    Returns:
      The module, on device "jax". Its values follow from ``torch.manual_seed``, not from the mesh.

    Raises:
      SignatureError: a pattern matches nothing, or a dimension cannot be split as it says.

    >>> import torch, torch2jax, jax
    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
    >>> model = torch2jax.device.sharded_init(
    ...     lambda: torch.nn.Linear(8, 4), mesh, {"weight": P("model", None)}, fsdp="data"
    ... )
    >>> tuple(model.weight.jax().sharding.spec)
    ('model', 'data')
    """
    enable()
    mesh = _automatic(mesh)
    built: list[torch.nn.Module] = []

    def run(words: Any) -> dict[str, Any]:
        draws = random_streams.drawing_from(words, words=True)
        with torch.device("jax"), draws, _large_are_traced():
            module = make()
            built[:] = [module]
            return {name: value_of(x) for name, x in _state_of(module).items()}

    words = random_streams.next_words()
    avals = jax.eval_shape(run, words)
    shardings = _shardings(avals, mesh, layout, fsdp)
    arrays = jax.jit(run, out_shardings=shardings)(words)
    (module,) = built
    for name, x in _state_of(module).items():
        x._cell.array, x._cell.recipe, x._memo = arrays[name], None, None
    return module


def shard_module(
    module: torch.nn.Module,
    mesh: Mesh,
    layout: Layout | None = None,
    fsdp: str | None = None,
) -> torch.nn.Module:
    """Split the parameters and buffers of a module that exists, in place.

    Args:
      module: a module. One on another device is first moved to device "jax", whole.
      mesh: a mesh, as in ``sharded_init``.
      layout: tensor parallelism, as in ``sharded_init``.
      fsdp: an axis, as in ``sharded_init``.

    Returns:
      The module.

    Raises:
      SignatureError: a pattern matches nothing, or a dimension cannot be split as it says.

    >>> import torch, torch2jax, jax
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> model = torch2jax.device.shard_module(torch.nn.Linear(8, 4), mesh, fsdp="data")
    >>> tuple(model.weight.jax().sharding.spec)
    (None, 'data')
    """
    enable()
    mesh = _automatic(mesh)
    found = _state_of(module.to("jax"))
    avals = {name: jax.ShapeDtypeStruct(x.shape, array_dtype(x.dtype)) for name, x in found.items()}
    for name, sharding in _shardings(avals, mesh, layout, fsdp).items():
        mark_sharding(found[name], sharding)
    return module


class _large_are_traced:
    """In this scope the traced program computes the large results of factories itself."""

    def __enter__(self) -> None:
        self.before, state.factories_traced = state.factories_traced, True

    def __exit__(self, *error: Any) -> None:
        state.factories_traced = self.before


def _state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return a module's tensors by name: parameters, buffers, and plain attributes."""
    found: dict[str, Any] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for prefix, part in module.named_modules():
        for name, x in vars(part).items():
            if isinstance(x, Tensor):
                found[f"{prefix}.{name}" if prefix else name] = x
    for name, x in found.items():
        if not isinstance(x, Tensor) or x._chain is not None:
            raise SignatureError(
                f"sharded_init makes modules of tensors on the default device that are no views; "
                f"{name} is {'a view' if isinstance(x, Tensor) else f'on {x.device}'}."
            )
    return found


def _shardings(
    avals: Mapping[str, Any], mesh: Mesh, layout: Layout | None, fsdp: str | None
) -> dict[str, NamedSharding]:
    """Return how each tensor is split."""
    if isinstance(layout, Mapping):
        for pattern in layout:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in avals):
                raise SignatureError(f"no parameter or buffer is called {pattern!r}.")

    def given(name: str, aval: Any) -> PartitionSpec:
        if not isinstance(layout, Mapping):
            return PartitionSpec() if layout is None else layout(name, aval)
        specs = (spec for p, spec in layout.items() if fnmatch.fnmatchcase(name, p))
        return next(specs, PartitionSpec())

    return {
        name: NamedSharding(mesh, _spec(name, aval.shape, mesh, given(name, aval), fsdp))
        for name, aval in avals.items()
    }


def _spec(
    name: str, shape: tuple[int, ...], mesh: Mesh, spec: PartitionSpec, fsdp: str | None
) -> PartitionSpec:
    axes: list[Any] = [None] * len(shape)
    if len(spec) > len(shape):
        raise SignatureError(f"{spec} is for more dimensions than {name} {shape} has.")
    axes[: len(spec)] = spec
    for size, names in zip(shape, axes, strict=True):
        parts = _size(mesh, names)
        if size % parts:
            raise SignatureError(
                f"{name} {shape}: {size} cannot be split over {names!r} ({parts})."
            )
    if fsdp is not None and fsdp not in _flat(axes):
        parts = _axis(mesh, fsdp)
        free = [d for d, a in enumerate(axes) if a is None and shape[d] % parts == 0]
        if free and max(shape[d] for d in free) > 1:
            axes[max(free, key=lambda d: shape[d])] = fsdp
    return PartitionSpec(*axes)


def _flat(axes: Any) -> list[str]:
    return [n for a in axes if a is not None for n in (a if isinstance(a, tuple) else (a,))]


def _size(mesh: Mesh, names: Any) -> int:
    return math.prod(_axis(mesh, n) for n in _flat([names]))


def _axis(mesh: Mesh, name: str) -> int:
    """Return the size of a mesh axis."""
    if name not in mesh.shape:
        raise SignatureError(f"the mesh has no axis {name!r}; it has {list(mesh.axis_names)}.")
    return mesh.shape[name]
