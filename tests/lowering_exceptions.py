"""Operators of PyTorch's table that are not as on CPU when they run on JAX, each with its reason."""

from __future__ import annotations

EXCEPTIONS: dict[str, str] = {}

# They draw: other numbers than PyTorch's. Shapes and dtypes are compared, values are not.
RANDOM = {
    "bernoulli", "cauchy", "exponential", "geometric", "log_normal", "multinomial", "normal",
    "normal.in_place", "poisson", "rand_like", "randint", "randint_like", "randn", "randn_like",
    "uniform", "nn.functional.alpha_dropout", "nn.functional.dropout", "nn.functional.dropout2d",
    "nn.functional.dropout3d", "nn.functional.feature_alpha_dropout", "nn.functional.rrelu",
    "nn.functional.fractional_max_pool2d", "nn.functional.fractional_max_pool3d",
    "pca_lowrank", "svd_lowrank",
}  # fmt: skip

# PyTorch leaves their gradients undefined up to a choice of its own.
UNDEFINED_GRADIENTS: set[str] = set()
