"""What an operator of device "jax" costs in eager mode, beside jax.numpy's own.

    python benchmarks/device.py --output docs/performance.md

Medians of the rounds, in microseconds. The arrays have 16 elements: this measures dispatch, not
arithmetic. Calls are not waited for; each round ends with `block_until_ready`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
from page import measured, number, table, write_section
from peers import versions

from torch2jax import device


def microseconds(call: Callable[[], Any], rounds: int, calls: int = 2000) -> float:
    call()
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out.jax() if isinstance(out, device.Tensor) else out)
        samples.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, metavar="FILE", help="replace the section of FILE")
    arguments = parser.parse_args()
    load, rounds = os.getloadavg()[0], arguments.rounds
    device.enable()
    a = jnp.ones(16)
    x = device.tensor(a)
    y = torch.ones(16)
    add = jax.jit(lambda a, b: a + b)
    update = jax.jit(lambda a: a.at[0].add(1))
    calls = {
        "torch on CPU, x + x": lambda: y + y,
        "jnp, a + a": lambda: a + a,
        "jax.jit, a + a": lambda: add(a, a),
        "device jax, x + x": lambda: x + x,
        "jax.jit, a.at[0].add(1)": lambda: update(a),
        "device jax, x[0].add_(1)": lambda: x[0].add_(1),
    }
    rows = [[name, number(microseconds(call, rounds))] for name, call in calls.items()]
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    layers.to("jax")
    data = torch.randn(32, 64).to("jax")
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.01)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = layers(data).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    compiled = device.jit(step)
    compiled()
    rows.append(["MLP training step, eager", number(microseconds(step, rounds, 50))])
    rows.append(["MLP training step, device.jit", number(microseconds(compiled, rounds, 200))])
    text = f"{measured(load, versions())}\n\n{table(['µs', 'median'], rows)}"
    print(text)
    if arguments.output:
        write_section(arguments.output, text, "device")


if __name__ == "__main__":
    main()
