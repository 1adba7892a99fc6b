"""``device.enable()`` makes "jax" a PyTorch device by what stands here."""
