"""PyTorch calls JAX functions here, with gradients in every mode."""
