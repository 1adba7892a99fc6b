"""What compiled=True saves, beside PyTorch alone, torch.compile, the bridge and lower=True.

    python benchmarks/programs/compiled.py --output docs/performance.md

Each round runs every subject, and each round begins with another one; the figures are medians. What
has been compiled before comes from the cache, so the first table says what an empty cache costs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages.page import measured, number, table, write_section
from subjects.peers import versions

from torch2jax import from_module, torch2jax

Run = Callable[[], Any]
WAYS: dict[str, dict[str, Any]] = {
    "compiled=True": {"compiled": True},
    "bridge": {},
    "lower=True": {"lower": True},
}


def seconds(run: Run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def medians(subjects: dict[str, Run], rounds: int) -> dict[str, float]:
    """Seconds of each subject."""
    names = list(subjects)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for run in subjects.values():
        run(), run()
    for i in range(rounds):
        for k in range(len(names)):
            name = names[(i + k) % len(names)]
            samples[name].append(seconds(subjects[name]))
    return {name: statistics.median(values) for name, values in samples.items()}


# --- the subjects --------------------------------------------------------------------------------

STEPS = 2000


def small(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.tanh(a @ b) * 2 + 1


def small_calls() -> dict[str, Run]:
    a, b = np.random.default_rng(0).standard_normal((2, 16, 16)).astype(np.float32) / 4
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)

    def in_torch(f: Any) -> Run:
        def run() -> None:
            x = ta
            with torch.no_grad():
                for _ in range(STEPS):
                    x = f(x, tb)

        return run

    def in_jax(f: Any) -> Run:
        looped = jax.jit(lambda a, b: jax.lax.fori_loop(0, STEPS, lambda _, x: f(x, b), a))
        return lambda: looped(a, b).block_until_ready()

    subjects = {"PyTorch": in_torch(small), "torch.compile": in_torch(torch.compile(small))}
    subjects |= {name: in_jax(torch2jax(small, **way)) for name, way in WAYS.items()}
    subjects["an empty loop"] = in_jax(lambda a, b: a + 0 * b)
    return subjects


class Energy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
        )

    def forward(self, atom: torch.Tensor) -> torch.Tensor:
        return self.net(atom).sum()


def forces() -> dict[str, Run]:
    """Energy and forces of 64 atoms: the gradient of a sum over ``vmap``."""
    torch.manual_seed(0)
    net = Energy()
    atoms = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    given = torch.from_numpy(atoms)

    def in_torch(f: Any) -> Run:
        def run() -> None:
            x = given.clone().requires_grad_()
            f(x).sum().backward()

        return run

    def in_jax(way: dict[str, Any]) -> Run:
        apply, variables = from_module(net, **way)
        energy = lambda x: jax.vmap(lambda atom: apply(variables, atom))(x).sum()  # noqa: E731
        step = jax.jit(jax.value_and_grad(energy))
        return lambda: jax.block_until_ready(step(atoms))

    batch = lambda x: net.net(x)  # noqa: E731
    subjects = {"PyTorch": in_torch(batch), "torch.compile": in_torch(torch.compile(batch))}
    return subjects | {name: in_jax(way) for name, way in WAYS.items()}


def transformer() -> dict[str, Run]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
    net = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    x = torch.randn(8, 128, 256)
    arrays = jnp.asarray(x.numpy())

    def in_torch(f: Any) -> Run:
        def run() -> None:
            net.zero_grad(set_to_none=True)
            (f(x) ** 2).mean().backward()

        return run

    def in_jax(way: dict[str, Any]) -> Run:
        apply, variables = from_module(net, **way)

        def loss(params: Any) -> Any:
            return (apply({**variables, "params": params}, arrays, train=True)[0] ** 2).mean()

        step = jax.jit(jax.value_and_grad(loss))
        return lambda: jax.block_until_ready(step(variables["params"]))

    subjects = {"PyTorch": in_torch(net), "torch.compile": in_torch(torch.compile(net))}
    return subjects | {name: in_jax(way) for name, way in WAYS.items()}


def two_threads(rounds: int) -> dict[str, float]:
    """Throughput of two threads with a call each, in that of one."""
    found = {}
    a, b = np.random.default_rng(0).standard_normal((2, 16, 16)).astype(np.float32) / 4
    for name in ("compiled=True", "bridge"):
        f = torch2jax(small, **WAYS[name])
        looped = jax.jit(lambda a, b, f=f: jax.lax.fori_loop(0, 5000, lambda _, x: f(x, b), a))

        def once(looped: Any = looped) -> None:
            looped(a, b).block_until_ready()

        def both(once: Run = once) -> None:
            threads = [threading.Thread(target=once) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        times = medians({"one": once, "two": both}, rounds)
        found[name] = 2 * times["one"] / times["two"]
    return found


FIRST = """
import time, numpy as np, torch, jax
from torch2jax import torch2jax
f = torch2jax(lambda a, b: torch.tanh(a @ b) * 2 + 1, compiled=True)
a = np.ones((16, 16), np.float32)
started = time.perf_counter()
jax.block_until_ready(f(a, a))
print(time.perf_counter() - started)
"""


def first_calls() -> dict[str, float]:
    """Seconds of the first call of a process: with an empty cache, and then with a full one."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCH2JAX_CACHE_DIR": folder, "TORCH2JAX_PROGRESS": "0"}
        environment["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "inductor")

        def told() -> float:
            command = [sys.executable, "-W", "ignore", "-c", FIRST]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            return float(done.stdout)

        return {"an empty cache": told(), "a second process": told()}


# --- the page ------------------------------------------------------------------------------------


def rows(times: dict[str, float], scale: float) -> list[list[str]]:
    native = times["PyTorch"]
    return [[name, number(t * scale), f"{t / native:.2f} x"] for name, t in times.items()]


def met(budget: str, holds: bool) -> list[str]:
    return [budget, "met" if holds else "**missed**"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=25, help="rounds of the small subjects (25)")
    add("--output", type=Path, metavar="FILE", help="replace the section of FILE")
    arguments = parser.parse_args()
    load, rounds = os.getloadavg()[0], arguments.rounds
    parts = [measured(load, versions())]
    loop = {k: t / STEPS for k, t in medians(small_calls(), rounds).items()}
    floor = loop.pop("an empty loop")
    parts += [
        "`tanh(a @ b) * 2 + 1`, 16 x 16, a call in a loop:",
        table(["", "µs", "in PyTorch's"], rows(loop, 1e6)),
    ]
    energy = medians(forces(), rounds)
    parts += [
        "Energy and forces of 64 atoms, `value_and_grad` over `vmap`:",
        table(["", "µs", "in PyTorch's"], rows(energy, 1e6)),
    ]
    step = medians(transformer(), max(rounds // 3, 3))
    parts += [
        "Value and gradient of a transformer, 4 layers of 256, batch 8 x 128:",
        table(["", "ms", "in PyTorch's"], rows(step, 1e3)),
    ]
    threads, first = two_threads(rounds), first_calls()
    parts += [
        "Two threads with a call each, in the throughput of one; and the first call of a process:",
        table(
            ["", ""],
            [
                *([f"two threads, {name}", f"{ratio:.2f} x"] for name, ratio in threads.items()),
                *([f"first call, {name}", f"{number(s)} s"] for name, s in first.items()),
            ],
        ),
    ]
    ours = "compiled=True"
    budgets = [
        met("forces: 5 x faster than the bridge", energy["bridge"] >= 5 * energy[ours]),
        met("forces: as fast as torch.compile", energy[ours] <= energy["torch.compile"]),
        met("transformer: at most 1.0 x PyTorch", step[ours] <= step["PyTorch"]),
        met("two threads: 1.8 x one", threads[ours] >= 1.8),
    ]
    parts += [
        f"A turn of the empty loop takes {number(floor * 1e6)} µs.",
        table(["budget", ""], budgets),
    ]
    text = "\n\n".join(parts)
    print(text)
    if arguments.output:
        write_section(arguments.output, text, "compiled")


if __name__ == "__main__":
    main()
