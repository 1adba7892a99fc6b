"""The PyTorch device "jax": tensors that hold JAX arrays."""

from ..lowerings.registry import register_lowering
from .registration import enable, is_enabled
from .tensor import Tensor, tensor

__all__ = ["Tensor", "enable", "is_enabled", "register_lowering", "tensor"]
