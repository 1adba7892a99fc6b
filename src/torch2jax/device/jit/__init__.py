"""``device.jit`` makes a function of jax tensors one compiled program."""
