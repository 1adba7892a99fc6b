"""``device.jit``: a function of jax tensors as one compiled program."""
