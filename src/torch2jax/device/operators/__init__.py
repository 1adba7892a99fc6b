"""PyTorch's dispatcher calls an operator on jax tensors, which a compiled program carries out."""
