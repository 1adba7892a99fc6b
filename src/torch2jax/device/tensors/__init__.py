"""The tensor of device "jax": its array, its views and its methods."""
