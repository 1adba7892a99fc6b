"""These modules set up PyTorch and this package while JAX traces a PyTorch function."""
