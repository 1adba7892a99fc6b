"""A module or an exported program becomes arrays and a JAX function of them."""

from __future__ import annotations

from typing import Any

import torch

from .._conversions.float64 import admit
from .._errors import SignatureError
from .interop import call_torch
from .setup.enable import enable
from .tensors.tensor import Tensor, from_torch, read, wrap


def extract(module: torch.nn.Module | torch.export.ExportedProgram) -> tuple[Any, Any]:
    """Turn a module into ``(state, fn)``: arrays by name, and a JAX function of them.

    Args:
      module: a module on device "jax" or the CPU, which is not changed, or a program of
        ``torch.export``.

    Returns:
      ``state``, which is ``{name: array}`` of parameters and buffers, and
      ``fn(state, args, kwargs=None)``, which runs in the mode (train or eval) of the module.

    Raises:
      SignatureError: for anything other than a module or an exported program.

    >>> import torch, torch2jax, jax.numpy as jnp
    >>> state, fn = torch2jax.device.extract(torch.nn.Linear(3, 2))
    >>> fn(state, (jnp.ones((4, 3)),)).shape
    (4, 2)
    """
    enable()
    if isinstance(module, torch.export.ExportedProgram):
        from .exported import extract_exported

        return extract_exported(module)
    if not isinstance(module, torch.nn.Module):
        raise SignatureError(
            f"extract takes a module or a program of torch.export, got {type(module).__name__}."
        )
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for dtype in {x.dtype for x in found.values() if not isinstance(x, Tensor)}:
        admit(dtype)
    state = {k: read(x) if isinstance(x, Tensor) else from_torch(x) for k, x in found.items()}
    dtypes = {k: x.dtype for k, x in found.items()}
    # Tied tensors have many places; PyTorch's own search fails to restore a part with two names.
    names = {id(x): k for k, x in found.items()}
    places = {
        f"{prefix}.{last}" if prefix else last: names[id(x)]
        for prefix, part in module.named_modules()
        for last, x in {**part._parameters, **part._buffers}.items()
        if x is not None
    }

    def fn(state: Any, args: Any, kwargs: Any = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            given: dict[str, torch.Tensor] = {k: wrap(x, dtypes[k]) for k, x in state.items()}
            tensors = {place: given[k] for place, k in places.items() if k in given}
            return torch.func.functional_call(module, tensors, args, kwargs, tie_weights=False)

        return call_torch(call, *args, **(kwargs or {}))

    return state, fn
