"""What gpu.py checks and measures: each function returns what it found, or raises.

All of it runs on a CPU too, in smaller sizes: `python benchmarks/programs/gpu.py --rehearse`.
"""

from __future__ import annotations

from collections.abc import Callable

from .gpu import memory, nested, results, speed, streams
from .gpu.common import Found

PARTS: dict[str, tuple[Callable[[], Found], ...]] = {
    "results": (
        *(results.dtypes, results.conversions, results.transforms, results.tape),
        *(results.randomness, results.values_of_the_host),
    ),
    "placement": (results.placement, results.jax_in_pytorch),
    "streams": (
        *(streams.host_does_not_wait, streams.gradients_do_not_wait),
        *(streams.late_weights, streams.racing),
    ),
    "lifetimes": (memory.lifetimes,),
    "memory": (memory.flat_memory,),
    "end of memory": (memory.end_of_memory,),
    "nested": (nested.refused_compile,),
    "nested, unseen": (nested.own_compile,),
    "torch.compile": (results.compiled_inside,),
    "speed": (speed.training_step, speed.calls),
}
"""Each has a process of its own."""

LIMITS = {"nested": 60, "nested, unseen": 60, "torch.compile": 90, "end of memory": 60}
"""Seconds for a part that may hang, or takes long to start."""

MAY_HANG = {"nested, unseen"}
"""The documentation says of these that they may: the page tells what they did."""

PREALLOCATING = {"end of memory"}
"""JAX starts as it does by default in these, with three quarters of the GPU."""
