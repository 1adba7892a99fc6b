"""These are torchax's names of types, for annotations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeAlias

import jax
import numpy as np
import torch

__all__ = ["JaxCallable", "JaxValue", "P", "TorchCallable", "TorchValue"]

P = ParamSpec("P")
TorchCallable: TypeAlias = Callable[P, Any]
JaxCallable: TypeAlias = Callable[P, Any]
TorchValue: TypeAlias = torch.Tensor | torch.dtype | Callable[..., Any] | Any
JaxValue: TypeAlias = jax.Array | np.dtype[Any] | Callable[..., Any] | Any
