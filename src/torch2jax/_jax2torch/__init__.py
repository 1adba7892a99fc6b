"""JAX functions called from PyTorch."""
