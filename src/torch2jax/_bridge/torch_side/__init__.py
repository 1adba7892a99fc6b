"""Functions of tensors and their derivatives live here. Nothing here imports JAX."""
