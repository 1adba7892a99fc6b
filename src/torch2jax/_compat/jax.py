"""All that differs between versions of jax stands here, and so does all use of its private API."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

# The public way to ask for these settings takes two functions of Python, and two have none.
from jax._src import config as _config

# The sharding and varying axes of a new aval have no public constructor.
from jax._src import core as _core

# Effects have no public registration; jax's own FFI call registers its effect the same way.
from jax._src import effects as _effects
from jax._src import mesh as _mesh

# The public class of arrays, jax.Array, is an ABC whose instance check costs a microsecond.
from jax._src.array import ArrayImpl
from jax._src.config import default_device as _default_device
from jax._src.config import default_matmul_precision as _default_matmul_precision
from jax._src.config import enable_x64 as _enable_x64

# The public way to ask whether a transform is under way takes more than a microsecond. Which one it
# is can be asked publicly from jax 0.7.1 on.
from jax._src.core import get_opaque_trace_state, trace_state_clean

# Rules for dead code have no public registration.
from jax._src.interpreters import partial_eval

# jax.dlpack imports and exports by this.
from jax._src.lib import _jax as _xla
from jax.interpreters import mlir

__all__ = [
    "FORGETS_DERIVATIVE_RULES",
    "ArrayImpl",
    "Primitive",
    "RandomEffect",
    "TorchEffect",
    "cpu_device",
    "current_mesh",
    "default_device",
    "device_count",
    "export_capsule",
    "get_opaque_trace_state",
    "has_run",
    "import_capsule",
    "local_device",
    "precision",
    "random_effect",
    "ready_on_gpu",
    "register_dce_rule",
    "register_remat_rule",
    "result_aval",
    "settings",
    "torch_effect",
    "trace_state_clean",
    "uncommitted",
    "under",
    "varying_axes",
    "varying_everywhere",
    "varying_together",
    "x64_enabled",
]

# The public jax.extend.core.Primitive is a fifth of this package's import: it loads pallas.
Primitive = _core.Primitive

FORGETS_DERIVATIVE_RULES: bool = jax.__version_info__ < (0, 12)
"""Whether a loop that is differentiated twice forgets the rule of a ``jax.custom_jvp``."""


class TorchEffect(_effects.Effect):
    """It marks a call with side effects, which is never dropped, merged or moved."""

    def __str__(self) -> str:
        return "TorchCall"


class RandomEffect(_effects.Effect):
    """It marks a draw from torch's generator, which ``jax.checkpoint`` would repeat differently."""

    def __str__(self) -> str:
        return (
            "random numbers drawn in PyTorch without a key: wrap the function with "
            "torch2jax(..., stochastic=True) and pass rng= (apply(..., rng=) for a module)"
        )

    __repr__ = __str__


def register_dce_rule(primitive: Any, rule: Callable[[list[bool], Any], Any]) -> None:
    """Register ``rule(used outputs, equation)`` for dead code.

    From jax 0.12 on JAX also tells which inputs are live.
    """
    partial_eval.dce_rules[primitive] = lambda used, *_and_eqn: rule(used, _and_eqn[-1])


def register_remat_rule(primitive: Any, staged: Callable[[Any, list[bool]], Any]) -> None:
    """Register ``staged(equation, operands that are recomputed)`` for ``jax.checkpoint``.

    It returns the equation that takes the place of one that has to wait for its tangents. All else
    is what JAX does with a primitive that has no rule. Such rules have no public registration.
    """

    def rule(
        saveable: Callable[..., Any],
        unknown: Sequence[bool],
        instantiated: Sequence[bool],
        eqn: Any,
    ) -> tuple[Any, Any, list[bool], list[bool], list[Any]]:
        some, every = [False] * len(eqn.outvars), [True] * len(eqn.outvars)
        ready = dict(zip(map(id, eqn.invars), instantiated, strict=True))
        if any(unknown):
            recomputed = [i and not u for i, u in zip(instantiated, unknown, strict=True)]
            eqn = staged(eqn, recomputed)
        else:
            policy = saveable(eqn.primitive, *[x.aval for x in eqn.invars], **eqn.params)
            policy = partial_eval.ensure_enum(policy)
            if eqn.effects or not isinstance(policy, partial_eval.RecomputeType):
                return eqn, None, some, some, []  # what a policy would offload is saved
        saved = [x for x in eqn.invars if isinstance(x, _core.Var) and not ready[id(x)]]
        return (None, eqn, every, every, saved) if any(unknown) else (eqn, eqn, some, every, saved)

    partial_eval.partial_eval_jaxpr_custom_rules[primitive] = rule


def device_count(ctx: Any) -> int:
    """Return on how many devices the program runs that is being lowered."""
    context = ctx.module_context.axis_context
    if hasattr(context, "mesh"):
        return context.mesh.size
    if hasattr(context, "num_devices"):
        return context.num_devices
    return context.axis_env.nreps  # pmap does so up to jax 0.7


def register_lowering(primitive: Any, rule: Any, platform: str | None = None) -> None:
    """Register a lowering rule that sees the values of the program itself.

    JAX lowers like equations once, on values of a function of their own, and copies what comes out;
    unless it is told not to, since it does so.
    """
    parameters = inspect.signature(mlir.register_lowering).parameters
    options = {"cacheable": False} if "cacheable" in parameters else {}
    mlir.register_lowering(primitive, rule, platform=platform, **options)


def called(ctx: Any, name: str) -> Any:
    """Return a context in which operations are called ``name`` in HLO and in profiles.

    XLA takes an instruction's name from the last part of its location. JAX 0.12 puts the operations
    of an inner jit into the program by the innermost name alone, so ours takes the place of JAX's.
    """
    from jax.extend.mlir import ir

    here = f"{ctx.name_stack}/{name}" if str(ctx.name_stack) else name
    inside: Any = ir.Location.current
    while _is_name(inside):
        inside = inside.child_loc
    return ir.Location.name(here, childLoc=inside)


def _is_name(location: Any) -> bool:
    # With jax 0.7 all have a child_loc, and reading that of another kind ends the process.
    if hasattr(location, "is_a_name"):
        return location.is_a_name()
    return hasattr(location, "child_loc")


def lowered_so_far(ctx: Any) -> int:
    """Return how many objects the program holds that is being lowered."""
    return len(ctx.module_context.keepalives)


def maker_of(value: Any, target: str) -> dict[str, Any]:
    """Return the attributes of the custom call to ``target`` whose last result ``value`` is.

    They are empty where it is not; MLIR knows ``value``.
    """
    operation = getattr(value.owner, "operation", value.owner)
    if getattr(operation, "name", None) != "stablehlo.custom_call":
        return {}
    attributes = operation.attributes
    if (
        "mhlo.backend_config" not in attributes
        or attributes["call_target_name"].value != target
        or operation.results[len(operation.results) - 1] != value
    ):
        return {}
    return {item.name: item.attr.value for item in attributes["mhlo.backend_config"]}


torch_effect = TorchEffect()
random_effect = RandomEffect()

for _allowed in (
    _effects.lowerable_effects,
    _effects.control_flow_allowed_effects,
    _effects.custom_derivatives_allowed_effects,
):
    _allowed.add_type(TorchEffect)
    _allowed.add_type(RandomEffect)
_effects.remat_allowed_effects.add_type(TorchEffect)


# --- varying manual axes (shard_map with check_vma=True) ----------------------------------------
# Up to jax 0.9 an aval has ``vma``; from 0.10 it has a manual axis type ``mat`` with ``varying``.


def current_mesh() -> jax.sharding.Mesh:
    """Return the mesh that ``jax.set_mesh`` has set; an empty one where there is none."""
    if hasattr(jax.sharding, "get_mesh"):
        return jax.sharding.get_mesh()
    from jax._src.mesh import empty_abstract_mesh, get_concrete_mesh  # jax 0.7 has these

    empty: Any = empty_abstract_mesh
    return get_concrete_mesh() or empty


def varying_axes(aval: Any) -> frozenset[str]:
    """Return the manual mesh axes over which a value of this aval varies."""
    if hasattr(aval, "mat"):
        return aval.mat.varying
    return getattr(aval, "vma", frozenset())


def varying_together(operands: Iterable[Any]) -> list[Any]:
    """Cast operands to their common varying axes; the casts transpose to sums over those axes."""
    operands = list(operands)
    varying = [varying_axes(jax.typeof(x)) for x in operands]
    union: frozenset[str] = frozenset().union(*varying)
    if not union:
        return operands
    return [
        _cast_varying(x, tuple(sorted(union - have))) if union - have else x
        for x, have in zip(operands, varying, strict=True)
    ]


def varying_everywhere(x: Any) -> Any:
    """Return ``x`` as a value that differs between the devices of all manual axes."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = [a for a in mesh.manual_axes if a not in varying_axes(jax.typeof(x))]
    return _cast_varying(x, tuple(manual)) if manual else x


def _cast_varying(x: Any, axes: tuple[str, ...]) -> Any:
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, axes, to="varying")
    return jax.lax.pvary(x, axes)  # type: ignore[attr-defined]


def result_aval(shape: tuple[int, ...], dtype: Any, operands: Iterable[Any]) -> Any:
    """Return the aval of a result, which varies over the axes over which operands vary."""
    sharding = _core.get_cur_mesh_sharding()
    for aval in operands:
        if not aval.sharding.mesh.empty:  # where no mesh is entered, types have it
            whole = jax.sharding.PartitionSpec(*[None] * len(shape))
            sharding = jax.sharding.NamedSharding(aval.sharding.mesh, whole)
            break
    axes: frozenset[str] = frozenset().union(*map(varying_axes, operands))
    if hasattr(_core, "ManualAxisType"):
        varying = _core.ManualAxisType(varying=axes)
        return _core.ShapedArray(shape, dtype, sharding=sharding, manual_axis_type=varying)
    return _core.ShapedArray(shape, dtype, sharding=sharding, vma=axes)  # type: ignore[call-arg]


# --- devices -------------------------------------------------------------------------------------


@functools.cache
def cpu_device() -> Any:
    """Return JAX's CPU; None where JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


@functools.cache
def local_device(platform: str, hardware_id: int) -> Any:
    """Return the device of this process that the driver knows by that number, or None.

    The number is not the place in a list: with one GPU per process the only device of the second
    process has the number 1.
    """
    try:
        found = jax.local_devices(backend=platform)
    except RuntimeError:
        return None
    return next((d for d in found if d.local_hardware_id == hardware_id), None)


def default_device() -> Any:
    """Return the device on which JAX puts new arrays, in this thread."""
    chosen = _default_device.value
    if chosen is None:
        return _first_device()
    return jax.local_devices(backend=chosen)[0] if isinstance(chosen, str) else chosen


@functools.cache
def _first_device() -> Any:
    return jax.local_devices()[0]


def uncommitted(array: Any) -> Any:
    """Return the same memory as an array that follows the arrays with which it is combined."""
    return ArrayImpl(array.aval, array.sharding, [array], committed=False, _skip_checks=True)


# --- DLPack at the speed of a call ---------------------------------------------------------------
# jax.dlpack.from_dlpack takes 22 µs, the import that it ends in 3; __dlpack__ is as slow to export.


import_capsule: Any = _xla.dlpack_managed_tensor_to_buffer
"""Called with ``(capsule, device, stream)`` it returns the array of a DLPack capsule that holds
row-major memory. On a CPU that memory is aligned to 64 bytes, any CPU device will do, and there is
no stream, but None."""

export_capsule: Any = _xla.buffer_to_dlpack_managed_tensor
"""Called with an array on one CPU device it returns a DLPack capsule, and the array is computed by
then. Called with an array on a GPU and a stream, it has the stream wait for the array."""


def ready_on_gpu(platform: str, number: int) -> tuple[Any, int] | None:
    """Return a GPU and the stream to which ``import_capsule`` looks there; None where JAX has none.

    An array that is imported with this stream is ready when what is queued on it now is done.
    """
    device = local_device(platform, number)
    return None if device is None else (device, device.get_stream_for_external_ready_events())


def x64_enabled() -> bool:
    """Return whether JAX carries 64-bit values now, in this thread."""
    return _enable_x64.value


def has_run(jitted: Any) -> bool:
    """Return whether a function of ``jax.jit`` has been compiled, for whatever operands."""
    return jitted._cache_size() > 0


if hasattr(_mesh, "abstract_mesh_context_manager"):  # from jax 0.12 on
    _abstract_mesh: Any = _mesh.abstract_mesh_context_manager  # type: ignore[attr-defined]
    _concrete_mesh: Any = _mesh.device_context  # type: ignore[attr-defined]
else:
    _abstract_mesh = _config.abstract_mesh_context_manager
    _concrete_mesh = _config.device_context

_SETTINGS: tuple[Any, ...] = (
    _enable_x64,
    _default_matmul_precision,
    _abstract_mesh,
    _concrete_mesh,
)
_precision_here: Any = _default_matmul_precision.get_local
_abstract_mesh_here: Any = _abstract_mesh.get_local
_concrete_mesh_here: Any = _concrete_mesh.get_local


def settings() -> tuple[Any, ...]:
    """Return what this thread is told that decides what is traced: 64-bit types come first.

    What it is not told is one object for all threads, which ``under`` takes as well.
    """
    # It is written out, because each call of jax2torch asks.
    return (
        _enable_x64.value,
        _precision_here(),
        _abstract_mesh_here(),
        _concrete_mesh_here(),
    )


@contextlib.contextmanager
def under(values: tuple[Any, ...]) -> Iterator[None]:
    """In this context ``settings()`` are these, in this thread."""
    before = [setting.swap_local(x) for setting, x in zip(_SETTINGS, values, strict=True)]
    try:
        yield
    finally:
        for setting, x in zip(_SETTINGS, before, strict=True):
            setting.set_local(x)


def precision(x64: bool) -> Any:
    """Return a context with 64-bit types on or off, in this thread."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(x64)
    return jax.experimental.enable_x64(x64)  # type: ignore[attr-defined]  # jax < 0.8
