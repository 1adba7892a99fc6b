"""The tensor of device "jax" has an array, views and methods."""
