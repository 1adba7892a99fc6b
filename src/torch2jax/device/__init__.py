"""The PyTorch device "jax": tensors that hold JAX arrays."""

from typing import TYPE_CHECKING, Any

from ..lowerings.registry import register_lowering
from .checkpoints import load_checkpoint, save_checkpoint
from .interop import (
    call_jax,
    call_torch,
    checkpoint,
    extract,
    jax_view,
    torch_view,
    value_and_grad,
)
from .jitted import jit
from .registration import enable, is_enabled
from .scan import scan
from .sharding import mark_sharding, shard_map, shard_module, sharded_init
from .tensor import Tensor, tensor

if TYPE_CHECKING:
    from .exported import export

__all__ = [
    "Tensor",
    "call_jax",
    "call_torch",
    "checkpoint",
    "enable",
    "export",
    "extract",
    "is_enabled",
    "jax_view",
    "jit",
    "load_checkpoint",
    "mark_sharding",
    "register_lowering",
    "save_checkpoint",
    "scan",
    "shard_map",
    "shard_module",
    "sharded_init",
    "tensor",
    "torch_view",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    if name == "export":  # torch.export and jax.export take a second to import
        from .exported import export as found

        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
