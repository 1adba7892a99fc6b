"""XLA calls PyTorch through a stack of folders; each imports only what stands below it.

``wrapping`` is at the top; then come ``calls``, ``jax_side``, ``handler`` and ``torch_side``.
"""
