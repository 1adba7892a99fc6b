"""``python -m torch2jax``: what is installed, whether it works, and what a call costs."""
