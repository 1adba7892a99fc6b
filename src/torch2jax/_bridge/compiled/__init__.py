"""``compiled=True``: XLA calls libraries that PyTorch compiled, and no Python lies between."""
