"""The state of PyTorch and of this package while JAX traces a PyTorch function."""
