"""Normalisations can be differentiated to any order here. This file imports torch, never JAX.

torch's derivatives of ``layer_norm``, and of ``batch_norm`` and ``instance_norm`` with statistics
of the batch, treat the mean and the standard deviation that the forward pass saved as constants.
The first derivative corrects that, and the second one does so in reverse mode. In forward over
forward mode and in every third derivative the result is silently wrong (torch 2.6 to 2.13). There
this file computes the functions from means and products, whose derivatives are right in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .derivatives import Jvp, Program, Vjp, Vmap

Tensor = torch.Tensor


def in_parts(program: Program | None, f: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``f``, a form of ``program``, with normalisations in parts where torch's fail."""
    derivatives, pullbacks, batched = 0, 0, False
    while program is not None:
        if isinstance(program, Jvp | Vjp):
            derivatives += 1
            pullbacks += 1 + isinstance(program, Jvp)
        batched |= isinstance(program, Vmap)
        program = program.base
    # torch.func.vmap cannot batch the second derivative of batch_norm.
    wanted = derivatives > 1 and (pullbacks > 2 or batched)
    return _InParts(f) if wanted else f


class _InParts:
    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __call__(self, *args: Tensor) -> Any:
        with _Mode():
            return self.run(*args)


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        function: Callable[..., Any] = _FUNCTIONS.get(func, func)  # type: ignore[arg-type]
        return function(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _native_layer_norm(input, normalized_shape, weight, bias, eps)[0]


def _native_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dims = tuple(range(input.dim() - len(normalized_shape), input.dim()))
    out, mean, scale = _normalised(input, dims, eps)
    out = out.to(input.dtype)
    if weight is not None:
        out = out * weight
    return (out if bias is None else out + bias), mean.to(input.dtype), scale.to(input.dtype)


def _normalised(input: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the input normalised by statistics over ``dims``, the mean, and 1/sqrt(var + eps)."""
    x = input.float() if input.dtype.itemsize < 4 else input
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    scale = torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
    return centred * scale, mean, scale


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    if not training or input.dim() < 2:
        return torch.batch_norm(
            input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled
        )
    return _native_batch_norm(
        input, weight, bias, running_mean, running_var, training, momentum, eps
    )[0]


def _native_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not training:
        return torch.native_batch_norm(
            input, weight, bias, running_mean, running_var, training, momentum, eps
        )
    out, mean, scale = _normalised(input, (0, *range(2, input.dim())), eps)
    _update(running_mean, running_var, mean, scale, momentum, eps, input.numel() // input.shape[1])
    return _affine(out, weight, bias).to(input.dtype), mean.flatten(), scale.flatten()


def _instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    if not use_input_stats or input.dim() < 3:
        return torch.instance_norm(
            input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps,
            cudnn_enabled,
        )  # fmt: skip
    out, mean, scale = _normalised(input, tuple(range(2, input.dim())), eps)
    count = input[0, 0].numel()
    _update(running_mean, running_var, mean, scale, momentum, eps, count)
    return _affine(out, weight, bias).to(input.dtype)


def _affine(out: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (-1,) + (1,) * (out.dim() - 2)
    if weight is not None:
        out = out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)


def _update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    momentum: float,
    eps: float,
    count: int,
) -> None:
    """Update running statistics in place by the batch's mean and its unbiased variance."""
    with torch.no_grad():
        rows = mean.shape[0], mean.shape[1]
        if running_mean is not None:
            running_mean.lerp_(mean.reshape(rows).mean(0).to(running_mean.dtype), momentum)
        if running_var is not None:
            var = (scale.reshape(rows) ** -2 - eps).mean(0) * (count / max(count - 1, 1))
            running_var.lerp_(var.to(running_var.dtype), momentum)


def _functional_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    return _batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)


def _functional_instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    return _instance_norm(
        input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps
    )


# The functions of torch.nn.functional call those of torch, and the mode does not see these calls.
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _functional_batch_norm,
    F.instance_norm: _functional_instance_norm,
    torch.layer_norm: _layer_norm,
    torch.native_layer_norm: _native_layer_norm,
    torch.batch_norm: _batch_norm,
    torch.native_batch_norm: _native_batch_norm,
    torch.instance_norm: _instance_norm,
}
