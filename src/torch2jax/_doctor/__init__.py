"""``python -m torch2jax`` shows what is installed, whether it works, and what a call costs."""
