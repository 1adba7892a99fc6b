"""An exported program becomes a JAX function, or StableHLO, with its dynamic shapes.

The graph of a ``torch.export.ExportedProgram`` has PyTorch's core operators. It is interpreted on
arrays, which may have the symbolic dimensions of ``jax.export``. Tensors could not have them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as torch_tree

from .. import lowerings  # noqa: F401  the import fills the table
from .._conversions.float64 import admit
from .._errors import SignatureError, Torch2JaxError
from ..lowerings.interpolation import DYNAMIC
from ..lowerings.promotion import array_dtype, cast
from ..lowerings.registry import lowering_of
from ..lowerings.views import GETTERS
from . import random_streams
from .interop import call_torch
from .setup.enable import enable
from .tensors.tensor import Tensor, from_torch, read

__all__ = ["Interpreter", "export", "extract_exported", "input_avals"]

aten = torch.ops.aten


def extract_exported(program: ExportedProgram) -> tuple[dict[str, Any], Callable[..., Any]]:
    """Return a program as ``(state, fn)``; see ``extract``."""
    enable()
    with warnings.catch_warnings():  # PyTorch copies trees in a way that it has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        core = program.run_decompositions()
    tensors: dict[str, Any] = {**core.state_dict, **core.constants}
    signature = core.graph_signature
    specs = signature.input_specs
    state: dict[str, Any] = {}
    for spec in specs:
        name = spec.target
        if name is not None and isinstance(tensors.get(name), torch.Tensor):
            x = tensors[name]
            if not isinstance(x, Tensor):
                admit(x.dtype)
            state[name] = read(x) if isinstance(x, Tensor) else from_torch(x)
    calls: Any = core.call_spec
    in_spec, out_spec = calls.in_spec, calls.out_spec
    wanted = [i for i, s in enumerate(signature.output_specs) if s.kind is OutputKind.USER_OUTPUT]

    def fn(state: Any, args: Any, kwargs: Any = None) -> Any:
        given, have = torch_tree.tree_flatten((tuple(args), dict(kwargs or {})))
        if have != in_spec:
            raise SignatureError(
                f"the program was exported for arguments {in_spec}, and is called with {have}."
            )
        user = iter(given)
        values = []
        for spec in specs:
            if spec.kind is InputKind.USER_INPUT:
                values.append(next(user))
            elif spec.target in state:
                values.append(state[spec.target])
            else:
                raise Torch2JaxError(
                    f"the program has an input of kind {spec.kind.name} ({spec.target}), which "
                    "cannot be converted."
                )
        outs = Interpreter(core.graph_module).run(*values, enable_io_processing=False)
        return torch_tree.tree_unflatten([outs[i] for i in wanted], out_spec)

    return state, fn


def export(program: ExportedProgram, **options: Any) -> jax.export.Exported:
    """Turn a program of ``torch.export`` into StableHLO, which runs without torch.

    Args:
      program: what ``torch.export.export`` returned. Its dynamic dimensions are symbolic dimensions
        of the result, with the same bounds.
      **options: options of ``jax.export.export``, such as ``platforms``.

    Returns:
      A ``jax.export.Exported``. It is called as ``exported.call(state, *args, **kwargs)`` with the
      state of ``extract(program)``. ``mlir_module()`` is its StableHLO, ``serialize()`` its bytes.

    Raises:
      SignatureError: ``program`` is not one; a module becomes one by ``torch.export.export``.
      Torch2JaxError: an operator has no lowering that takes dynamic shapes.

    >>> import torch, torch2jax, jax.numpy as jnp
    >>> rows = torch.export.Dim("rows", max=64)
    >>> program = torch.export.export(
    ...     torch.nn.Linear(3, 2), (torch.ones(4, 3),), dynamic_shapes=({0: rows},)
    ... )
    >>> exported = torch2jax.device.export(program)
    >>> state, fn = torch2jax.device.extract(program)
    >>> exported.call(state, jnp.ones((7, 3))).shape
    (7, 2)
    """
    if not isinstance(program, ExportedProgram):
        raise SignatureError(
            f"export takes what torch.export.export returned, got {type(program).__name__}."
        )
    state, fn = extract_exported(program)
    args, kwargs = input_avals(program)
    avals = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)

    def call(state: Any, *args: Any, **kwargs: Any) -> Any:
        return fn(state, args, kwargs)

    call.__name__ = type(program.graph_module).__name__.lower()
    return jax.export.export(jax.jit(call), **options)(avals, *args, **kwargs)


def input_avals(program: ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return shapes and dtypes of a program's arguments, with symbolic dynamic dimensions."""
    nodes = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    bounds = []
    for symbol, bound in program.range_constraints.items():
        bounds.append(f"{symbol} >= {int(bound.lower)}")
        if bound.upper.is_finite is not False and bound.upper < 2**31:
            bounds.append(f"{symbol} <= {int(bound.upper)}")
    scope = jax.export.SymbolicScope(bounds)

    def aval(value: Any) -> Any:
        if isinstance(value, bool | int | float):
            return jax.ShapeDtypeStruct((), jax.dtypes.canonicalize_dtype(type(value)))
        if not isinstance(value, torch.Tensor):
            return value
        dims = ", ".join(str(d) for d in value.shape)
        shape = jax.export.symbolic_shape(dims, scope=scope) if dims else ()
        return jax.ShapeDtypeStruct(shape, array_dtype(value.dtype))

    given = [s.arg for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    user = [aval(x.value if isinstance(x, ConstantArgument) else nodes[x.name]) for x in given]
    calls: Any = program.call_spec
    return torch_tree.tree_unflatten(user, calls.in_spec)


class Interpreter(torch.fx.Interpreter):
    """An interpreter runs a graph of core operators on arrays."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(target, torch._ops.OpOverload):
            if isinstance(target, torch._ops.HigherOrderOperator):
                raise Torch2JaxError(f"{target} in an exported program, which is not supported.")
            return target(*args, **kwargs)  # the operator module computes sizes
        if target in _OF_SIZES:
            return _OF_SIZES[target](*args, **kwargs)
        if target in GETTERS:
            return GETTERS[target](*args, **kwargs)
        if target is aten._to_copy.default:
            dtype = kwargs.get("dtype")
            admit(dtype)
            return args[0] if dtype is None else cast(args[0], array_dtype(dtype))
        lowered = lowering_of(target)
        if lowered is not None and not lowered.eager:
            kwargs = {k: v for k, v in kwargs.items() if k not in _OF_MEMORY}
            if lowered.random:
                return lowered.fn(
                    random_streams.next_words(kwargs.pop("generator", None)), *args, **kwargs
                )
            return lowered.fn(*args, **kwargs)
        arrays = [x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, jax.Array)]
        if any(not isinstance(d, int) for x in arrays for d in x.shape):
            if target in DYNAMIC:
                return DYNAMIC[target](*args, **kwargs)
            raise Torch2JaxError(f"{target} has no lowering that takes dynamic shapes.")
        return call_torch(target, *args, **kwargs)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Skip checks of sizes and dtypes, which hold already."""


_OF_MEMORY = ("device", "layout", "pin_memory", "memory_format", "non_blocking")
_OF_SIZES: dict[Any, Callable[..., Any]] = {
    aten.sym_size.int: lambda x, dim: x.shape[dim],
    aten.sym_numel.default: lambda x: math.prod(x.shape),
    aten.sym_stride.int: lambda x, dim: math.prod(x.shape[dim % x.ndim + 1 :]),
    aten._assert_scalar.default: _nothing,
    aten._assert_async.msg: _nothing,
    aten._assert_tensor_metadata.default: _nothing,
    aten.sym_constrain_range.default: _nothing,
    aten.sym_constrain_range_for_size.default: _nothing,
}
