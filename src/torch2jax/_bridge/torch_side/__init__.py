"""Functions of tensors and their derivatives. Nothing here imports JAX."""
