"""The dispatcher finds these kernels by the device: factories, a copy and a read of a value."""

from __future__ import annotations

from typing import Any

import torch

from ..operators import dispatch
from ..tensors.tensor import only_one


def register_factories() -> Any:
    """Register kernels for operators without a tensor among their arguments."""
    library = torch.library.Library("aten", "IMPL")
    for name in _FACTORIES:
        packet, _, which = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet, None), which or "default", None)
        if op is None:
            continue
        for key in ("PrivateUse1", "Lazy"):
            library.impl(name, _factory(op), key)
    for key in ("PrivateUse1", "Lazy"):
        library.impl("_copy_from", _copy_from, key)
        library.impl("_local_scalar_dense", _number, key)
    return library


def _number(x: Any) -> Any:
    """Read a number for ``torch.tensor([x, y])``, which goes past ``__torch_dispatch__``."""
    return dispatch.dispatch(torch.ops.aten._local_scalar_dense.default, (), (x,))


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    """Move data for ``torch.tensor(data, device="jax")``, which goes past the dispatch."""
    return dispatch.dispatch(torch.ops.aten.copy_.default, (), (target, source))


_FACTORIES = (
    "empty.memory_format",
    "empty_strided",
    "empty_permuted",
    "zeros",
    "ones",
    "full",
    "scalar_tensor",
    "arange",
    "arange.start",
    "arange.start_step",
    "linspace",
    "logspace",
    "eye",
    "eye.m",
    "tril_indices",
    "triu_indices",
    "rand",
    "rand.generator",
    "randn",
    "randn.generator",
    "randint",
    "randint.generator",
    "randint.low",
    "randint.low_generator",
    "randperm",
    "randperm.generator",
    "_efficientzerotensor",
    "kaiser_window",
    "kaiser_window.periodic",
    "kaiser_window.beta",
    "fft_fftfreq",
)


def _factory(op: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> Any:
        only_one(kwargs.pop("device", None))
        kwargs.pop("pin_memory", None)
        kwargs.pop("layout", None)
        if kwargs.get("dtype", 0) is None:
            kwargs.pop("dtype")
        return dispatch.dispatch(op, (), args, kwargs)

    return make
