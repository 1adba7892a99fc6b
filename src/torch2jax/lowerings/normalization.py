"""Softmax, and layers that normalise, have float32 statistics for half precision."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from .promotion import array_dtype, cast, floating, wide
from .registry import lowering


@lowering("_softmax")
def softmax(self: Any, dim: int, half_to_float: bool) -> Any:
    x = cast(self, wide(self.dtype))
    out = np.dtype(np.float32) if half_to_float else self.dtype
    return cast(jax.nn.softmax(x, dim) if x.ndim else jnp.ones_like(x) + 0 * x, out)


@lowering("_log_softmax")
def log_softmax(self: Any, dim: int, half_to_float: bool) -> Any:
    x = cast(self, wide(self.dtype))
    out = np.dtype(np.float32) if half_to_float else self.dtype
    return cast(jax.nn.log_softmax(x, dim) if x.ndim else 0 * x, out)


@lowering("softmax.int", "special_softmax")
def softmax_int(self: Any, dim: int, dtype: Any = None) -> Any:
    return softmax(cast(self, array_dtype(dtype) if dtype else floating(self.dtype)), dim, False)


@lowering("log_softmax.int", "special_log_softmax")
def log_softmax_int(self: Any, dim: int, dtype: Any = None) -> Any:
    return log_softmax(
        cast(self, array_dtype(dtype) if dtype else floating(self.dtype)), dim, False
    )


@lowering("_safe_softmax")
def safe_softmax(self: Any, dim: int, dtype: Any = None) -> Any:
    x = cast(self, array_dtype(dtype) if dtype else floating(self.dtype))
    return cast(_safe_softmax(cast(x, wide(x.dtype)), dim), x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _safe_softmax(x: Any, dim: int) -> Any:
    """Return a softmax in which a row of -inf alone is 0, not NaN."""
    top = lax.stop_gradient(jnp.max(x, dim, keepdims=True, initial=-jnp.inf))
    e = jnp.exp(x - jnp.where(top == -jnp.inf, 0, top))
    total = jnp.sum(e, dim, keepdims=True)
    return e / jnp.where(top == -jnp.inf, 1, total)


@_safe_softmax.defjvp
def _safe_softmax_jvp(dim: int, primals: Any, tangents: Any) -> Any:
    # dy = y (dx - sum(y dx))
    (x,), (dx,) = primals, tangents
    y = _safe_softmax(x, dim)
    return y, y * (dx - jnp.sum(y * dx, dim, keepdims=True))


@lowering("_softmax_backward_data")
def softmax_backward_data(grad_output: Any, output: Any, dim: int, input_dtype: torch.dtype) -> Any:
    g = cast(grad_output, wide(grad_output.dtype)) * cast(output, wide(output.dtype))
    total = jnp.sum(g, dim, keepdims=True) if g.ndim else g
    return cast(g - output * total, array_dtype(input_dtype))


@lowering("_log_softmax_backward_data")
def log_softmax_backward_data(
    grad_output: Any, output: Any, dim: int, input_dtype: torch.dtype
) -> Any:
    g = cast(grad_output, wide(grad_output.dtype))
    total = jnp.sum(g, dim, keepdims=True) if g.ndim else g
    return cast(g - jnp.exp(cast(output, g.dtype)) * total, array_dtype(input_dtype))


# --- layer, group and batch norm -----------------------------------------------------------------


def _standardised(x: Any, axes: tuple[int, ...], eps: float) -> tuple[Any, Any, Any]:
    """Return (x with mean 0 and variance 1 over ``axes``, mean, 1 / standard deviation)."""
    mean = jnp.mean(x, axes, keepdims=True)
    off = x - mean
    rstd = lax.rsqrt(jnp.mean(off * off, axes, keepdims=True) + eps)
    return off * rstd, mean, rstd


@lowering("native_layer_norm")
def native_layer_norm(input: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    x = cast(input, wide(input.dtype))
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    out, mean, rstd = _standardised(x, axes, eps)
    if weight is not None:
        out = out * cast(weight, x.dtype)
    if bias is not None:
        out = out + cast(bias, x.dtype)
    # PyTorch's derivative is that of the first result alone. JAX's includes the statistics, because
    # PyTorch's backward pass uses them and may be differentiated again.
    return cast(out, input.dtype), mean, rstd


@lowering("native_layer_norm_backward")
def native_layer_norm_backward(
    grad_out: Any,
    input: Any,
    normalized_shape: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    bias: Any,
    output_mask: Any,
) -> Any:
    # y = w n + b with n = (x - mean) rstd:  dx = rstd (h - <h> - n <h n>), h = g w.
    compute = wide(input.dtype)
    x, g = cast(input, compute), cast(grad_out, compute)
    inner = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    outer = tuple(range(x.ndim - len(normalized_shape)))
    n = (x - mean) * rstd
    h = g if weight is None else g * cast(weight, compute)
    dx = dw = db = None
    if output_mask[0]:
        dx = rstd * (
            h - jnp.mean(h, inner, keepdims=True) - n * jnp.mean(h * n, inner, keepdims=True)
        )
        dx = cast(dx, input.dtype)
    if output_mask[1] and weight is not None:
        dw = cast(jnp.sum(g * n, outer), weight.dtype)
    if output_mask[2] and bias is not None:
        db = cast(jnp.sum(g, outer), bias.dtype)
    return dx, dw, db


@lowering("_fused_rms_norm")
def fused_rms_norm(input: Any, normalized_shape: Any, weight: Any, eps: float | None) -> Any:
    x = cast(input, wide(input.dtype))
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    eps = float(jnp.finfo(input.dtype).eps) if eps is None else eps
    rstd = lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + eps)
    out = x * rstd
    if weight is not None:
        out = out * cast(weight, x.dtype)
    return cast(out, input.dtype), rstd


def _channels(v: Any, ndim: int) -> Any:
    return v.reshape((1, -1, *[1] * (ndim - 2)))


@lowering("native_group_norm")
def native_group_norm(
    input: Any, weight: Any, bias: Any, N: int, C: int, HxW: int, group: int, eps: float
) -> Any:
    x = cast(input, wide(input.dtype)).reshape(N, group, C // group * HxW)
    out, mean, rstd = _standardised(x, (2,), eps)
    out = out.reshape(input.shape)
    if weight is not None:
        out = out * cast(_channels(weight, input.ndim), out.dtype)
    if bias is not None:
        out = out + cast(_channels(bias, input.ndim), out.dtype)
    dtype = input.dtype
    return cast(out, dtype), cast(mean.squeeze(2), dtype), cast(rstd.squeeze(2), dtype)


@lowering("native_group_norm_backward")
def native_group_norm_backward(
    grad_out: Any,
    input: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    N: int,
    C: int,
    HxW: int,
    group: int,
    output_mask: Any,
) -> Any:
    compute = wide(input.dtype)
    shape = (N, group, C // group * HxW)
    x, g = cast(input, compute), cast(grad_out, compute)
    m, r = cast(mean, compute)[..., None], cast(rstd, compute)[..., None]
    n = (x.reshape(shape) - m) * r
    dx = dw = db = None
    if output_mask[0]:
        h = g if weight is None else g * cast(_channels(weight, x.ndim), compute)
        h = h.reshape(shape)
        dx = r * (h - jnp.mean(h, 2, keepdims=True) - n * jnp.mean(h * n, 2, keepdims=True))
        dx = cast(dx.reshape(input.shape), input.dtype)
    axes = (0, *range(2, x.ndim))
    if output_mask[1] and weight is not None:
        dw = cast(jnp.sum(g * n.reshape(input.shape), axes), weight.dtype)
    if output_mask[2]:
        db = cast(jnp.sum(g, axes), input.dtype)
    return dx, dw, db


def _batch_norm(
    input: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float,
    eps: float,
) -> Any:  # fmt: skip
    """Return (out, saved mean, saved 1 / standard deviation, new mean, new variance)."""
    x = cast(input, wide(input.dtype))
    axes = (0, *range(2, x.ndim))
    if training:
        count = x.size // x.shape[1] if x.shape[1] else 0
        out, m, rstd = _standardised(x, axes, eps)
        saved = m.reshape(-1), rstd.reshape(-1)
        if mean is not None:
            variance = lax.stop_gradient(jnp.mean((x - m) ** 2, axes))
            unbiased = variance * (count / max(count - 1, 1))
            mean = cast((1 - momentum) * mean + momentum * lax.stop_gradient(saved[0]), mean.dtype)
            var = cast((1 - momentum) * var + momentum * unbiased, var.dtype)
    else:
        m, v = cast(mean, x.dtype), cast(var, x.dtype)
        out = (x - _channels(m, x.ndim)) * lax.rsqrt(_channels(v, x.ndim) + eps)
        empty = jnp.zeros((0,), x.dtype)
        saved = empty, empty
    if weight is not None:
        out = out * _channels(cast(weight, x.dtype), x.ndim)
    if bias is not None:
        out = out + _channels(cast(bias, x.dtype), x.ndim)
    return cast(out, input.dtype), *saved, mean, var


@lowering("_native_batch_norm_legit_functional")
def batch_norm_functional(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool,
    momentum: float, eps: float,
) -> Any:  # fmt: skip
    return _batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)


@lowering("_native_batch_norm_legit.no_stats")
def batch_norm_no_stats(
    input: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> Any:
    return _batch_norm(input, weight, bias, None, None, True, momentum, eps)[:3]


@lowering("_native_batch_norm_legit_no_training")
def batch_norm_no_training(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: float,
    eps: float,
) -> Any:  # fmt: skip
    return _batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps)[:3]


@lowering("_batch_norm_no_update")
def batch_norm_no_update(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: float,
    eps: float,
) -> Any:  # fmt: skip
    out = _batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps)[:3]
    return *out, jnp.zeros((0,), np.uint8)


@lowering("native_batch_norm_backward")
def native_batch_norm_backward(
    grad_out: Any, input: Any, weight: Any, running_mean: Any, running_var: Any, save_mean: Any,
    save_invstd: Any, train: bool, eps: float, output_mask: Any,
) -> Any:  # fmt: skip
    compute = wide(input.dtype)
    x, g = cast(input, compute), cast(grad_out, compute)
    axes = (0, *range(2, x.ndim))
    if train:
        m, r = cast(save_mean, compute), cast(save_invstd, compute)
    else:
        m, r = cast(running_mean, compute), lax.rsqrt(cast(running_var, compute) + eps)
    m, r = _channels(m, x.ndim), _channels(r, x.ndim)
    n = (x - m) * r
    dx = dw = db = None
    if output_mask[0]:
        h = g if weight is None else g * _channels(cast(weight, compute), x.ndim)
        if train:
            h = h - jnp.mean(h, axes, keepdims=True) - n * jnp.mean(h * n, axes, keepdims=True)
        dx = cast(h * r, input.dtype)
    if output_mask[1]:
        dw = cast(jnp.sum(g * n, axes), input.dtype if weight is None else weight.dtype)
    if output_mask[2]:
        db = cast(jnp.sum(g, axes), input.dtype if weight is None else weight.dtype)
    return dx, dw, db


@lowering("batch_norm_backward")
def batch_norm_backward(
    grad_out: Any, input: Any, weight: Any, running_mean: Any, running_var: Any, save_mean: Any,
    save_var: Any, update: bool, eps: float, output_mask: Any, reserve: Any,
) -> Any:  # fmt: skip
    return native_batch_norm_backward(
        grad_out, input, weight, running_mean, running_var, save_mean, save_var, update, eps,
        output_mask,
    )  # fmt: skip
