"""Operators whose derivative cannot be taken inside a traced function, each with its reason."""

from __future__ import annotations

_VALUES = "PyTorch's own backward pass, or the operator, asks for a value: an error that says so"
_SPARSE = "a sparse tensor: JAX's arrays are dense"

EXCEPTIONS: dict[str, str] = {
    "index_reduce_prod-float32": _VALUES,
    "scatter_reduce_prod-float32": _VALUES,
    "nn_functional_gaussian_nll_loss-float32": _VALUES,
    "to-float32": _VALUES,
    "tensor_split-float32": "PyTorch wants these indices on the CPU",
    "sparse_sampled_addmm-float32": _SPARSE,
    "to_sparse-float32": _SPARSE,
    "chalf-float32": "JAX has no complex32",
    "logcumsumexp-float32": "values around 1e4 in float32: the last digits differ",
    "linalg_lstsq-float32": "its residuals may be empty, by the rank of the matrix",
    "linalg_lstsq_grad_oriented-float32": "its residuals may be empty, by the rank of the matrix",
}

# They save their result or statistics, so they run in `make test` too.
SAVING = {
    "acos", "exp", "fft.fft", "fft.irfft", "linalg.cholesky", "linalg.inv", "linalg.norm",
    "nn.functional.batch_norm", "nn.functional.group_norm", "nn.functional.instance_norm",
    "nn.functional.layer_norm", "nn.functional.rms_norm",
    "nn.functional.scaled_dot_product_attention", "norm", "pow", "prod", "sgn", "sigmoid",
    "softmax", "sqrt", "std", "tanh", "var_mean",
}  # fmt: skip
