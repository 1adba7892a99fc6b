"""An operator of PyTorch on jax tensors: from the dispatcher's call to a compiled program."""
