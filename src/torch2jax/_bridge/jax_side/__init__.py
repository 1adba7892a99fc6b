"""The primitive has its rules here, one file per transform; importing this package registers them.

The rules import JAX and never torch: derivatives and batches of a callee come from the callee.
"""

from . import batching, derivatives, lowering

__all__ = ["batching", "derivatives", "lowering"]
