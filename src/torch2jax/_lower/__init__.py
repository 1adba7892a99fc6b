"""PyTorch functions as JAX programs, operator by operator: ``lower=True``."""
