"""Raw custom calls of the extension's handler."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from torch2jax import _ext
from torch2jax._bridge.handler import extension

TARGET = f"{_ext.__name__.partition('.')[0]}_test_extension"
jax.ffi.register_ffi_target(TARGET, _ext.cpu_handler(), platform="cpu")


F32 = jnp.float32
# From the second call of a compiled program on, JAX raises a plain ValueError with the same text.
ERRORS = (jax.errors.JaxRuntimeError, ValueError)


def setup(**changes: Any) -> None:
    """What the package hands to the handler, with changes."""
    extension.set_up(**changes)


def struct(*shape: int, dtype: Any = F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
