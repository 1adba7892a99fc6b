"""These are convolutions and their derivatives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .promotion import per_dimension
from .registry import lowering

_LETTERS = "HWD"


@lowering("convolution", "convolution_overrideable")
def convolution(
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    if any(p < 0 for p in padding):
        raise RuntimeError("negative padding is not supported")
    single = input.ndim == weight.ndim - 1  # it is one sample without a batch dimension
    x = input[None] if single else input
    out = _convolve(x, weight, stride, padding, dilation, transposed, output_padding, groups)
    if bias is not None and x.shape[1]:
        out = out + bias.reshape((1, -1, *[1] * (out.ndim - 2)))
    return out[0] if single else out


def _convolve(
    x: Any, w: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> Any:  # fmt: skip
    n = w.ndim - 2
    stride, padding, dilation = (per_dimension(v, n) for v in (stride, padding, dilation))
    space = _LETTERS[:n]
    layout = (f"NC{space}", f"OI{space}", f"NC{space}")
    if not transposed:
        out = lax.conv_general_dilated(
            x, w, stride, [(p, p) for p in padding], None, dilation, layout, groups
        )
        return out if x.shape[1] else out[:, :0]  # of no channels PyTorch makes none
    # The transpose of a convolution is a convolution of x, its elements `stride` apart, with the
    # flipped kernel, whose channels change places within each group.
    extra = per_dimension(output_padding, n)
    w = jnp.flip(w, tuple(range(2, w.ndim)))
    w = w.reshape(groups, w.shape[0] // groups, w.shape[1], *w.shape[2:])
    w = jnp.swapaxes(w, 1, 2).reshape(-1, w.shape[1], *w.shape[3:])
    reach = [d * (k - 1) for d, k in zip(dilation, w.shape[2:], strict=True)]
    pads = [(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)]
    return lax.conv_general_dilated(x, w, (1,) * n, pads, stride, dilation, layout, groups)


@lowering("convolution_backward", "convolution_backward_overrideable")
def convolution_backward(
    grad_output: Any,
    input: Any,
    weight: Any,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Any,
) -> Any:
    rest = (stride, padding, dilation, transposed, output_padding, groups)
    dx = dw = db = None
    # It is linear in either operand, so the derivatives are transposes.
    if output_mask[0]:
        (dx,) = jax.linear_transpose(lambda x: _convolve(x, weight, *rest), input)(grad_output)
    if output_mask[1]:
        (dw,) = jax.linear_transpose(lambda w: _convolve(input, w, *rest), weight)(grad_output)
    if output_mask[2]:
        db = jnp.sum(grad_output, (0, *range(2, grad_output.ndim)))
        db = db if db.size else jnp.zeros(bias_sizes, db.dtype)
    return dx, dw, db


# --- patches -------------------------------------------------------------------------------------


def _patch_places(
    size: Any, kernel: Any, dilation: Any, padding: Any, stride: Any
) -> tuple[np.ndarray[Any, Any], int, int]:
    """Return flat places in the padded image: (kernel elements, positions)."""
    h, w = size[0] + 2 * padding[0], size[1] + 2 * padding[1]
    nh = (h - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    nw = (w - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    ky, kx = np.meshgrid(np.arange(kernel[0]), np.arange(kernel[1]), indexing="ij")
    py, px = np.meshgrid(np.arange(nh), np.arange(nw), indexing="ij")
    y = ky.reshape(-1, 1) * dilation[0] + py.reshape(1, -1) * stride[0]
    x = kx.reshape(-1, 1) * dilation[1] + px.reshape(1, -1) * stride[1]
    return y * w + x, h, w


@lowering("im2col")
def im2col(self: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> Any:
    x = self[None] if self.ndim == 3 else self
    p = padding
    places, h, w = _patch_places(x.shape[2:], kernel_size, dilation, p, stride)
    x = jnp.pad(x, ((0, 0), (0, 0), (p[0], p[0]), (p[1], p[1])))
    patches = x.reshape(*x.shape[:2], h * w)[:, :, places]
    out = patches.reshape(x.shape[0], x.shape[1] * places.shape[0], places.shape[1])
    return out[0] if self.ndim == 3 else out


@lowering("col2im")
def col2im(
    self: Any, output_size: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any
) -> Any:
    x = self[None] if self.ndim == 2 else self
    p = padding
    places, h, w = _patch_places(output_size, kernel_size, dilation, p, stride)
    patches = x.reshape(x.shape[0], x.shape[1] // places.shape[0], *places.shape)
    image = jnp.zeros((*patches.shape[:2], h * w), x.dtype).at[:, :, places].add(patches)
    image = image.reshape(*patches.shape[:2], h, w)
    image = image[:, :, p[0] : p[0] + output_size[0], p[1] : p[1] + output_size[1]]
    return image[0] if self.ndim == 2 else image
