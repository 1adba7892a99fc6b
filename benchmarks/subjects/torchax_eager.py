"""What ``device.py`` measures, for torchax, in the interpreter that has it; prints JSON.

Microseconds, medians of single calls taken in turns, beside jax.numpy's own in the same process.
There is no training step: ``loss.backward()`` finds no graph on its tensors.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for n in range(20 + rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            if n >= 20:
                taken[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    import torch
    import torchax  # type: ignore[import-not-found]

    rounds = int(sys.argv[1])
    torch.set_num_threads(1)
    torchax.enable_globally()
    x = torch.ones(16, device="jax")
    a: Any = x.jax()  # type: ignore[attr-defined]
    found = medians(
        {
            "jnp, a + a": lambda: a + a,
            "torchax, x + x": lambda: x + x,
            "torchax, x[0].add_(1)": lambda: x[0].add_(1),
        },
        rounds,
    )
    names = ("torchax", "jax", "torch")
    versions = {name: importlib.metadata.version(name) for name in names}
    print(json.dumps({"versions": versions, "us": found}))


if __name__ == "__main__":
    main()
