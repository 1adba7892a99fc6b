"""The PyTorch device "jax": tensors that hold JAX arrays."""

from ..lowerings.registry import register_lowering
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
from .tensor import Tensor, tensor

__all__ = [
    "Tensor",
    "call_jax",
    "call_torch",
    "checkpoint",
    "enable",
    "extract",
    "is_enabled",
    "jax_view",
    "jit",
    "register_lowering",
    "tensor",
    "torch_view",
    "value_and_grad",
]
