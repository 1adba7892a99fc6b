"""What operators of device "jax" cost in eager mode, beside jax.numpy's own and compiled ones; and
an add on each way between the frameworks.

    python benchmarks/programs/device.py --output docs/performance.md
    python benchmarks/programs/device.py --sync

Medians of single calls, in microseconds, taken in turns, so that what else the machine does meets
all of them. The arrays have 16 elements: this measures dispatch, not arithmetic. Calls are not
waited for, so larger operators, each of which waits for the one before, hand over between threads:
give it two idle cores. `--sync` runs programs in the caller's thread. The jitted operators of a
training step are the compiled programs that one eager step has called, each called again on the
same arrays.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch

from torch2jax import device, jax2torch, torch2jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages.page import measured, number, table, write_section
from subjects.peers import versions

Calls = dict[str, Callable[[], Any]]


def medians(calls: Calls, rounds: int, each: int = 5) -> dict[str, float]:
    """Microseconds of each call."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # what ran before has emptied the caches
            for _ in range(each):
                start = time.perf_counter()
                call()
                taken[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(times) for name, times in taken.items()}


class Recorder:
    """In place of ``jax.jit``: notes the calls of compiled functions that are made under it."""

    def __init__(self) -> None:
        self.real, self.calls, self.on = jax.jit, [], False

    def __enter__(self) -> Recorder:
        def jit(fn: Any, **options: Any) -> Any:
            compiled = self.real(fn, **options)

            def call(*args: Any) -> Any:
                if self.on:
                    self.calls.append((compiled, args))
                return compiled(*args)

            return call

        jax.jit = jit  # type: ignore[assignment]
        return self

    def __exit__(self, *error: Any) -> None:
        jax.jit = self.real


def mlp_step(place: str = "jax") -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    layers.to(place)
    data = torch.randn(32, 64).to(place)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.01)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = layers(data).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def double(x: Any) -> Any:
    return x + x


def budget(what: str, at_most: float, found: float) -> list[str]:
    return [what, f"{at_most:g} x", f"{found:.2f} x", "met" if found <= at_most else "missed"]


def of_torchax(python: str, rounds: int) -> list[str]:
    """The same of torchax, in a process of its own, with a sum of jax.numpy for comparison."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    program = Path(__file__).resolve().parents[1] / "subjects" / "torchax_eager.py"
    command = [python, "-W", "ignore", str(program), str(rounds)]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment).stdout
    told = json.loads(out.splitlines()[-1])
    named = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    rows = [[name, number(value)] for name, value in told["us"].items()]
    return [
        f"The same of torchax, in a process of its own: {named}.",
        table(["µs", "median"], rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=400, help="rounds of the operators (400)")
    add("--sync", action="store_true", help="programs run in the caller's thread")
    add("--torchax", metavar="PYTHON", help="interpreter that has torchax")
    add("--output", type=Path, metavar="FILE", help="replace the section of FILE")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(1)  # its pool of threads disturbs what is measured in turns with it
    if arguments.sync:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    device.enable()
    # Recorded before anything is compiled: programs are kept, with the jit that they were made by.
    with Recorder() as recorder:
        recorded = mlp_step()
        recorded()
        recorder.on = True
        recorded()
        recorder.on = False
    from torch2jax.device.operators import dispatch
    from torch2jax.device.tensors import view_chains

    dispatch.forget()
    view_chains.ROOT._next.clear()
    view_chains.ROOT.pattern._next.clear()
    step = mlp_step()
    compiled = device.jit(mlp_step())

    def operators() -> None:
        for call, args in recorder.calls:
            call(*args)

    a = jnp.ones(16)
    x = device.tensor(a)
    y = torch.ones(16)
    jitted = jax.jit(lambda a, b: a + b)
    added, bridged, lowered, reverse = (
        device.jit(double),
        torch2jax(double),
        jax.jit(torch2jax(double, lower=True)),
        jax2torch(double),
    )
    update = jax.jit(lambda a: a.at[0].add(1))
    found = medians(
        {
            "torch on CPU, x + x": lambda: y + y,
            "jnp, a + a": lambda: a + a,
            "jax.jit, a + a": lambda: jitted(a, a),
            "device jax, x + x": lambda: x + x,
            "device.jit, x + x": lambda: added(x),
            "torch2jax, a + a": lambda: bridged(a),
            "torch2jax(lower=True) under jax.jit, a + a": lambda: lowered(a),
            "jax2torch, y + y": lambda: reverse(y),
            "jax.jit, a.at[0].add(1)": lambda: update(a),
            "device jax, x[0].add_(1)": lambda: x[0].add_(1),
        },
        arguments.rounds,
    )
    steps = medians(
        {
            f"MLP training step, its {len(recorder.calls)} jitted operators": operators,
            "MLP training step, eager": step,
            "MLP training step, device.jit": compiled,
            "MLP training step, torch on CPU": mlp_step("cpu"),
        },
        max(arguments.rounds // 7, 1),
        1,
    )
    parts, eager, *_ = steps.values()
    in_place = found["device jax, x[0].add_(1)"] / found["jax.jit, a.at[0].add(1)"]
    budgets = [
        budget("x + x / jnp", 2, found["device jax, x + x"] / found["jnp, a + a"]),
        budget("x[0].add_(1) / jitted", 5, in_place),
        budget("eager step / its jitted operators", 3, eager / parts),
    ]
    rows = [[name, number(value)] for name, value in {**found, **steps}.items()]
    parts = [
        measured(load, versions()),
        table(["µs", "median"], rows),
        table(["budget", "at most", "measured", "verdict"], budgets),
    ]
    if arguments.torchax:
        parts += of_torchax(arguments.torchax, arguments.rounds)
    text = "\n\n".join(parts)
    print(text)
    if arguments.output:
        write_section(arguments.output, text, "device")


if __name__ == "__main__":
    main()
