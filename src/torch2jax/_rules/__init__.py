"""Rules of the primitive, one file per transform; importing this package registers them.

They import JAX and never torch: derivatives and batches of a callable come from the callable.
"""

from . import autodiff, batching, lowering

__all__ = ["autodiff", "batching", "lowering"]
