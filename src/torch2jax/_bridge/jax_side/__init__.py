"""Rules of the primitive, one file per transform; importing this package registers them.

They import JAX and never torch: derivatives and batches of a callee come from the callee.
"""

from . import batching, derivatives, lowering

__all__ = ["batching", "derivatives", "lowering"]
