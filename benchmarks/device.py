"""What an operator of device "jax" costs in eager mode, beside jax.numpy's own.

    python benchmarks/device.py

Medians of 7 rounds, in microseconds. The arrays have 16 elements: this measures dispatch, not
arithmetic. Calls are not waited for; each round ends with `block_until_ready`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch

from torch2jax import device


def microseconds(call: Callable[[], Any], number: int = 2000) -> float:
    call()
    rounds = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(number):
            out = call()
        jax.block_until_ready(out.jax() if isinstance(out, device.Tensor) else out)
        rounds.append((time.perf_counter() - start) / number * 1e6)
    return statistics.median(rounds)


def main() -> None:
    device.enable()
    a = jnp.ones(16)
    x = device.tensor(a)
    y = torch.ones(16)
    add = jax.jit(lambda a, b: a + b)
    update = jax.jit(lambda a: a.at[0].add(1))
    rows = {
        "torch on CPU, x + x": lambda: y + y,
        "jnp, a + a": lambda: a + a,
        "jax.jit, a + a": lambda: add(a, a),
        "device jax, x + x": lambda: x + x,
        "jax.jit, a.at[0].add(1)": lambda: update(a),
        "device jax, x[0].add_(1)": lambda: x[0].add_(1),
    }
    for name, call in rows.items():
        print(f"{name:28s} {microseconds(call):8.1f} us")
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
    print(f"{'MLP training step, eager':28s} {microseconds(step, 50):8.1f} us")
    print(f"{'MLP training step, jit':28s} {microseconds(compiled, 200):8.1f} us")


if __name__ == "__main__":
    main()
