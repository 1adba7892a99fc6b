"""Operators of PyTorch's table that are not as on CPU when they run on JAX, each with its reason."""

from __future__ import annotations

_VALUE = (
    "its result is a Python value, or it looks at one: an error that says so in a traced function"
)
_EQUALS = "which of equal values comes first is left open by PyTorch"
_SPARSE = "a sparse tensor: JAX's arrays are dense"
_NOISE = "the gradient is 0, and what is compared is rounding"
_VECTORS = "eigenvectors are defined up to a factor: the kernels choose different ones"
_ROUNDING = "values around 1e4 in float32: the last digits differ"
_REPEATED = "places that occur twice: the gradient of the one that is overwritten is 0 in JAX"

_ONCE = "PyTorch rounds to bfloat16 on the way, a lowering at the end"
_STATISTICS = "PyTorch returns these statistics in float32 on every device but the CPU"

EXCEPTIONS: dict[str, str] = {}


def _add(reason: str, *names: str) -> None:
    for name in names:
        modes = [""] if name.endswith(("-eager", "-lowered")) else ["-eager", "-lowered"]
        EXCEPTIONS.update({name + mode: reason for mode in modes})


_add(
    _VALUE,
    *("item-float32-lowered", "item-int64-lowered", "allclose-float32-lowered"),
    *("equal-float32-lowered", "equal-int64-lowered", "nn_functional_one_hot-int64-lowered"),
    *("nn_functional_gaussian_nll_loss-float32-lowered", "narrow-float32-lowered"),
    *("narrow-int64-lowered", "to-float32-lowered", "to-int64-lowered"),
)
_add(_EQUALS, "kthvalue-int64", "topk-int64")
_add(_SPARSE, "sparse_sampled_addmm-float32", "sparse_mm_reduce-float32")
_add(_SPARSE, "to_sparse-float32-lowered", "to_sparse-int64-lowered")
_add(_VECTORS, "linalg_eigh-float32")
_add(_ROUNDING, "matrix_exp-float32", "logcumsumexp-float32")
_add(
    _REPEATED,
    *("nn_functional_max_unpool1d-float32-lowered", "nn_functional_max_unpool2d-float32-lowered"),
    *("nn_functional_max_unpool3d-float32-lowered", "as_strided_scatter-float32-lowered"),
)
_add(_STATISTICS, "native_layer_norm-bfloat16", "_native_batch_norm_legit-bfloat16")
_add(
    "PyTorch's derivative takes the statistics for constants, of which its backward pass is made",
    *("native_layer_norm-float32-lowered", "native_batch_norm-float32-lowered"),
    *("_native_batch_norm_legit-float32-lowered", "_batch_norm_with_update-float32-lowered"),
)
_add(_EQUALS, "sort-bfloat16", "topk-bfloat16")
_add(_ONCE, "native_group_norm-bfloat16-lowered", "nextafter-bfloat16-lowered")
_add(_NOISE, "cov-float32-lowered")
_add(
    "PyTorch's gradient of the triangle that is not read is not 0",
    "cholesky_solve-float32-lowered",
)
_add(_SPARSE, "sparse_mm_reduce-bfloat16")
_add(_ROUNDING, "logcumsumexp-bfloat16-lowered")
_add(_REPEATED, "as_strided_scatter-bfloat16-lowered")
_add("JAX has no complex32", "chalf-float32", "chalf-int64")
_add("PyTorch wants these indices on the CPU", "tensor_split-float32", "tensor_split-int64")
_add("PyTorch wants these scales beside the operands", "torch__scaled_mm-float8_e4m3fn-eager")
_add("PyTorch wants these scales beside the operands", "torch__scaled_mm_v2-float8_e4m3fn-eager")

# Indices that are the same everywhere name places twice.
REPEATED_WHEN_EXPANDED = dict.fromkeys(
    (
        "index_copy-float32-lowered",
        "put-float32-lowered",
        "scatter-float32-lowered",
        "nn_functional_max_unpool1d_grad-float32-lowered",
        "nn_functional_max_unpool2d_grad-float32-lowered",
        "nn_functional_max_unpool3d_grad-float32-lowered",
    ),
    _REPEATED,
)

# Only with x64 off.
NARROW = {
    "bincount-int64-eager": "its result is float64, which JAX has not while x64 is off",
    **dict.fromkeys(
        ("hash_tensor-int64-eager", "hash_tensor-int64-lowered"),
        "a hash has 64 bits, which JAX has not while x64 is off: an error",
    ),
    **dict.fromkeys(
        ("linspace_tensor_overload-int64-eager", "linspace_tensor_overload-int64-lowered"),
        "PyTorch's step is float64: what is an integer in it may be just below that in float32",
    ),
}

# They draw: other numbers than PyTorch's. Shapes and dtypes are compared, values are not.
RANDOM = {
    "bernoulli", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "normal",
    "normal.in_place", "poisson", "rand_like", "randint", "randint_like", "randn", "randn_like",
    "uniform", "nn.functional.alpha_dropout", "nn.functional.dropout", "nn.functional.dropout2d",
    "nn.functional.dropout3d", "nn.functional.feature_alpha_dropout", "nn.functional.rrelu",
    "nn.functional.fractional_max_pool2d", "nn.functional.fractional_max_pool3d",
    "nn.functional.multi_head_attention_forward", "pca_lowrank", "svd_lowrank",
}  # fmt: skip

# PyTorch leaves their gradients undefined up to a choice of its own.
UNDEFINED_GRADIENTS: set[str] = set()
