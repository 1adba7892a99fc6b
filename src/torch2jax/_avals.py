"""Between JAX's avals and torch's specs of operands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import torch

from ._dtypes import dtype_j2t
from ._infer import Spec

# Made here, where no mode of a caller sees it.
_CPU, _CUDA = torch.device("cpu"), torch.device("cuda")


def specs_of(avals: Iterable[tuple[tuple[int, ...], Any]], device: torch.device) -> list[Spec]:
    """Specs of operands with these (shape, dtype) pairs."""
    return [Spec(tuple(shape), dtype_j2t(dtype), device) for shape, dtype in avals]


def default_device() -> torch.device:
    """Where torch computes for JAX's default backend."""
    if jax.default_backend() in ("gpu", "cuda", "rocm") and torch.cuda.is_available():
        return _CUDA
    return _CPU
