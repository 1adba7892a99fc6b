"""``device.enable()`` makes "jax" a PyTorch device with the modules of this package."""
