"""Small plain functions are inferred without fake tensors, which take seconds to load.

This file imports torch, never JAX. A stand-in shows a shape, strides, a dtype and a CPU, and no
values. Inside it has a small tensor of zeros, on which PyTorch's kernels run. (Those for meta
tensors load all of torch.compile.) It knows only operators that are pure and whose result has a
shape that no value decides. At all else, be it a tensor of the user's own, an operator in place or
a large tensor, a run on stand-ins is given up, and the function runs on fake tensors. So a run on
stand-ins that ends shows what one on fake tensors would.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .recorder import Recorder

_NAMES = """
    alias detach expand permute select slice split split_with_sizes squeeze t transpose unbind
    unsqueeze view _unsafe_view diagonal
    _to_copy cat clone scalar_tensor stack zeros_like ones_like

    abs acos acosh add asin asinh atan atan2 atanh ceil clamp clamp_max clamp_min cos cosh div
    eq erf erfc exp exp2 expm1 floor floor_divide fmod ge gt le lerp log log10 log1p log2 lt
    maximum minimum mul ne neg pow reciprocal remainder round rsqrt sigmoid sign sin sinh sqrt
    sub tan tanh trunc where
    bitwise_and bitwise_not bitwise_or bitwise_xor logical_and logical_not logical_or logical_xor
    relu gelu silu softplus elu hardtanh leaky_relu

    addmm baddbmm bmm mm

    all amax amin any argmax argmin max mean min sum prod cumsum cumprod std var
    _softmax _log_softmax mse_loss native_layer_norm
"""
_KNOWN = frozenset(f"aten::{name}" for name in _NAMES.split())


def fakes_are_loaded() -> bool:
    """Return whether all that fake tensors need is there already; then stand-ins save nothing.

    A mode of fake tensors imports the settings of torch.compile, and with them all of it.
    """
    return sys.modules.keys() >= _FAKES


_FAKES = {"torch._subclasses.fake_tensor", "torch._dynamo"}


def without_compiler(mode: type[TorchDispatchMode]) -> None:
    """Let a mode's operators leave torch.compile alone, which PyTorch loads to keep it out of them.

    That takes seconds, and where it is not loaded, nothing is compiled.
    """
    wrapped: Any = mode.__torch_dispatch__
    setattr(mode, "__torch_dispatch__", getattr(wrapped, "__wrapped__", wrapped))  # noqa: B010


class RecorderOfStandins(Recorder):
    """This recorder sees a run on stand-ins."""


without_compiler(RecorderOfStandins)


class GivenUp(Exception):
    """A run on stand-ins met what they do not know."""


class Standin(torch.Tensor):
    """A stand-in shows a shape, strides, a dtype and a CPU, but no values."""

    _zeros: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise GivenUp  # the mode is switched off


def _standin(zeros: torch.Tensor) -> Standin:
    made = torch.Tensor._make_wrapper_subclass(
        Standin,
        zeros.size(),
        strides=zeros.stride(),
        storage_offset=zeros.storage_offset(),
        dtype=zeros.dtype,
        device=zeros.device,
    )
    made._zeros = zeros
    torch._C._set_throw_on_mutable_data_ptr(made)
    return made


_CPU = torch.device("cpu")


class StandinMode(TorchDispatchMode):
    """Under this mode operators run on stand-ins; ``given_up`` says whether one could not."""

    def __init__(self) -> None:
        super().__init__()
        self.given_up = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Functions may catch what is raised here. So from here on everything is.
        if self.given_up or func._schema.name not in _KNOWN or func._schema.is_mutable:
            self._give_up()
        try:
            inside: list[torch.Tensor] = []
            values = [self._of(x, inside) for x in args]
            named = {name: self._of(x, inside) for name, x in (kwargs or {}).items()}
            if not _is_small(inside):
                self._give_up()
            return self._made(func(*values, **named))
        except Exception:
            self.given_up = True
            raise

    def _give_up(self) -> None:
        self.given_up = True
        raise GivenUp

    def _of(self, x: Any, inside: list[torch.Tensor]) -> Any:
        if type(x) is Standin:
            inside.append(x._zeros)
            return x._zeros
        if isinstance(x, list | tuple):
            return [self._of(item, inside) for item in x]
        if x is None or type(x) in _PLAIN or x is torch.strided:
            return x
        if type(x) is torch.device and x == _CPU:
            return x
        return self._give_up()

    def _made(self, out: Any) -> Any:
        if type(out) is torch.Tensor:
            return _standin(out)
        if isinstance(out, list | tuple):
            return type(out)([self._made(item) for item in out])
        return self._give_up()


def _is_small(tensors: list[torch.Tensor]) -> bool:
    """Return whether an operator on these tensors takes no time, and its result no memory."""
    sizes = [x.numel() for x in tensors]
    same = len({x.shape for x in tensors}) <= 1
    return max(sizes, default=0) <= _LARGE and (same or math.prod(sizes) <= _LARGE**1.5)


_LARGE = 2**16
"""Elements. Two broadcast tensors have at most as many together as the product says."""

without_compiler(StandinMode)

_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.memory_format)


def standin_for(shape: tuple[int, ...], dtype: torch.dtype) -> Standin:
    """Return a stand-in for an operand of this shape and dtype."""
    if math.prod(shape) > _LARGE:
        raise GivenUp
    with _disable_current_modes():
        return _standin(torch.zeros(shape, dtype=dtype, device=_CPU))
