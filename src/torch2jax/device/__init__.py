"""The PyTorch device "jax" has tensors that hold JAX arrays.

Each of these parts imports only what stands above it:

- ``thread_state`` and ``random_streams`` know what is under way on a thread, and from what it
  draws random numbers.
- ``tensors``: a tensor is a cell with an array, and the view steps from there to what it shows.
- ``operators``: ``dispatch`` finds what carries out an operator. In ``operator`` a call is read by
  ``operands``, its ``program`` is found or made by the ``route``, ``runners`` carry it out, and
  ``results`` wraps what comes back.
- ``setup``: ``enable`` makes "jax" a PyTorch device.
- ``tracing`` has what JAX needs to know to trace a PyTorch function.
- ``jit`` makes a function of tensors one compiled program.
- ``interop`` calls JAX functions from PyTorch programs and back.
- ``sharding``, ``scan``, ``checkpoints`` and ``exported`` are four uses of the device.
- ``extract`` turns a module or an exported program into arrays and a JAX function of them.
"""

from typing import TYPE_CHECKING, Any

from .._conversions.float64 import strict_float64
from .checkpoints import load_checkpoint, save_checkpoint
from .extract import extract
from .interop import call_jax, call_torch, checkpoint, jax_view, tensor, torch_view, value_and_grad
from .jit.jitted import jit
from .operators.dispatch import register_lowering
from .scan import scan
from .setup.enable import enable, is_enabled
from .sharding import mark_sharding, shard_map, shard_module, sharded_init
from .tensors.tensor import Tensor

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
    "strict_float64",
    "tensor",
    "torch_view",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    if name == "export":  # torch.export and jax.export take a second to import
        from .exported import export as found

        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
