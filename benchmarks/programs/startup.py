"""Seconds until a bridge is of use, in a process of its own: ``python startup.py PACKAGE``."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import torch


def main() -> None:
    package = sys.argv[1]
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    os.environ["PATH"] = os.pathsep.join(path)  # wrap_torch2jax calls ninja
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    start = time.perf_counter()
    torch2jax = importlib.import_module(package).torch2jax
    imported = time.perf_counter()

    # jax's own start (its backend, its first compilation) is not the bridge's.
    a, b = jnp.ones(16), jnp.ones(16)
    jax.jit(lambda a, b: a * b)(a, b).block_until_ready()
    examples = () if package == "torch2jax" else (torch.ones(16), torch.ones(16))

    begin = time.perf_counter()
    torch2jax(lambda a, b: torch.sin(a) + b, *examples)(a, b).block_until_ready()
    first = time.perf_counter()
    torch2jax(lambda a, b: torch.cos(a) * b, *examples)(a, b).block_until_ready()
    second = time.perf_counter()
    seconds = {"import": imported - start, "first": first - begin, "next": second - first}
    print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
