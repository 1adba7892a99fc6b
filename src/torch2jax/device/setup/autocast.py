"""Autocast casts operands in front of the operators that PyTorch's own lists name."""

from __future__ import annotations

from typing import Any

import torch

from ..tensors.tensor import AUTOCAST

__all__ = ["register_autocast"]

# These are PyTorch's lists for CUDA of what gains from half precision, and what needs float32.
_LOWER = (
    *("conv1d", "conv2d", "conv2d.padding", "conv3d", "conv_transpose1d", "conv_transpose2d.input"),
    *("conv_transpose3d.input", "convolution", "conv1d.padding", "conv3d.padding"),
    *("mm", "mv", "bmm", "baddbmm", "addmm", "addmv", "addbmm", "matmul", "linear", "einsum"),
    *("prelu", "chain_matmul", "linalg_multi_dot", "scaled_dot_product_attention"),
)
_FLOAT = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p"),
    *("reciprocal", "rsqrt", "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar"),
    *(
        "softplus",
        "layer_norm",
        "native_layer_norm",
        "group_norm",
        "nuclear_norm",
        "cosine_similarity",
    ),
    *(
        "poisson_nll_loss",
        "cosine_embedding_loss",
        "nll_loss",
        "nll_loss2d",
        "hinge_embedding_loss",
    ),
    *("kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss"),
    *("multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss"),
    *("binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm", "logsumexp"),
    *("prod", "prod.dim_int", "cumprod", "cumsum", "sum", "sum.dim_IntList"),
    *("softmax.int", "log_softmax.int", "norm.Scalar", "norm.ScalarOpt_dim"),
)


def register_autocast() -> list[Any]:
    """Put the casts in place. They last as long as what is returned."""
    rest = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel)
    library = torch.library.Library("aten", "IMPL")
    for names, make in ((_LOWER, _lower), (_FLOAT, _float)):
        for name in names:
            packet, _, which = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet, None), which or "default", None)
            if op is not None:
                library.impl(name, make(op), "AutocastPrivateUse1")
    return [rest, library]


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype is not torch.float64


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, list | tuple):
        return [_cast(y, dtype) for y in x]
    return x.to(dtype) if _is_float(x) and x.dtype is not dtype else x


def _redispatch(op: Any, args: Any, kwargs: Any) -> Any:
    keys = torch._C.DispatchKeySet(AUTOCAST)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return op(*args, **kwargs)


def _lower(op: Any) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("jax")
        given = [_cast(a, dtype) for a in args]
        return _redispatch(op, given, {k: _cast(v, dtype) for k, v in kwargs.items()})

    return kernel


def _float(op: Any) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = [_cast(a, torch.float32) for a in args]
        return _redispatch(op, given, {k: _cast(v, torch.float32) for k, v in kwargs.items()})

    return kernel
