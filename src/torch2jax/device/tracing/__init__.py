"""What a trace of a PyTorch function by JAX needs to know."""
