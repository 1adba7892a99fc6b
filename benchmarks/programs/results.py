"""What large results cost: computed in XLA's memory, beside copies, PyTorch alone and JAX alone.

    python benchmarks/programs/results.py --output docs/performance.md

Subjects run in interleaved rounds in one process; figures are medians, and ratios are medians of
the ratios of the rounds. `copied` is this package with its results computed elsewhere and copied.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages.page import measured, number, table, write_section

OURS, COPIED, OUT, XLA, TORCH = "torch2jax", "copied", "out_arg", "jax.jit", "PyTorch"
SIZES = (65_536, 262_144, 1_000_000, 4_000_000, 16_000_000, 40_000_000)
LIMIT = 1.5

Calls = dict[str, Callable[[], Any]]
Clock = Callable[[], float]


class Row(NamedTuple):
    """Seconds a call in each round, by subject."""

    name: str
    seconds: dict[str, list[float]]

    def median(self, subject: str) -> float:
        return statistics.median(self.seconds[subject])

    def ratio(self, subject: str, to: str) -> float:
        pairs = zip(self.seconds[subject], self.seconds[to], strict=True)
        return statistics.median(a / b for a, b in pairs)


def copying(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call, which has learned to leave its results where they are."""
    from torch2jax._bridge.torch_side.placing import placement

    pays = placement.pays
    placement.pays = lambda *_: False
    try:
        jax.block_until_ready(call())
    finally:
        placement.pays = pays
    return call


def doubled(size: int) -> Calls:
    from torch2jax import torch2jax

    x = jnp.ones(size // 4, jnp.float32)
    source = torch.ones(size // 4)
    ours, copied = torch2jax(lambda x: x * 2.0), torch2jax(lambda x: x * 2.0)
    out = torch2jax(lambda x, out=None: torch.mul(x, 2.0, out=out), out_arg="out")
    xla = jax.jit(lambda x: x * 2.0)
    return {
        OURS: lambda: ours(x),
        COPIED: copying(lambda: copied(x)),
        OUT: lambda: out(x),
        XLA: lambda: xla(x),
        TORCH: lambda: source * 2.0,
    }


def logits() -> Calls:
    """Those of a language model: 512 tokens, 20,480 words, 256 wide; 42 MB."""
    from torch2jax import torch2jax

    x, w = jnp.ones((512, 256)), jnp.ones((20_480, 256))
    tokens, words = torch.ones(512, 256), torch.ones(20_480, 256)

    def head(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(torch.tanh(x), w)

    ours, copied = torch2jax(head), torch2jax(lambda x, w: head(x, w))
    xla = jax.jit(lambda x, w: jnp.tanh(x) @ w.T)
    return {
        OURS: lambda: ours(x, w),
        COPIED: copying(lambda: copied(x, w)),
        XLA: lambda: xla(x, w),
        TORCH: lambda: head(tokens, words),
    }


def timed(name: str, calls: Calls, rounds: int, clock: Clock) -> Row:
    def seconds_of(call: Callable[[], Any], count: int) -> float:
        start = clock()
        for _ in range(count):
            jax.block_until_ready(call())
        return (clock() - start) / count

    counts = {}
    for subject, call in calls.items():
        for _ in range(3):
            jax.block_until_ready(call())
        counts[subject] = max(1, min(int(0.01 / max(seconds_of(call, 1), 1e-6)), 1_000))
    seconds: dict[str, list[float]] = {subject: [] for subject in calls}
    for _ in range(rounds):
        for subject, call in calls.items():
            jax.block_until_ready(call())
            seconds[subject].append(seconds_of(call, counts[subject]))
    return Row(name, seconds)


def markdown(rows: list[Row], load: float, unit: str) -> str:
    from subjects.peers import versions

    subjects = (OURS, COPIED, OUT, XLA, TORCH)
    head = [f"µs, {unit}", *subjects, f"{OURS} / {TORCH}", f"{COPIED} / {TORCH}"]
    lines = [
        [
            row.name,
            *(number(row.median(s) * 1e6) if s in row.seconds else "-" for s in subjects),
            f"{number(row.ratio(OURS, TORCH))} x",
            f"{number(row.ratio(COPIED, TORCH))} x",
        ]
        for row in rows
    ]
    limited = [row for row in rows if row.name.startswith(("4,000,000", "40,000,000"))]
    verdicts = ", ".join(
        f"{number(row.ratio(OURS, TORCH))} x at {row.name}: "
        + ("met" if row.ratio(OURS, TORCH) <= LIMIT else "missed")
        for row in limited
    )
    budget = f"Budget: at most {LIMIT} x {TORCH}. {verdicts}." if limited else ""
    return "\n\n".join([measured(load, versions()), table(head, lines), budget]).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=40, help="interleaved rounds (40)")
    add("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES", help="of results")
    add("--cpu", action="store_true", help="count CPU time, where others use the machine too")
    add("--output", type=Path, metavar="FILE", help="replace the section of FILE")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    load = os.getloadavg()[0]
    clock = time.process_time if options.cpu else time.perf_counter
    rounds, few = options.rounds, max(3, options.rounds // 5)
    rows = [timed(f"{n:,} bytes, `x * 2.0`", doubled(n), rounds, clock) for n in options.sizes]
    rows.append(timed("logits, 42 MB", logits(), few, clock))
    text = markdown(rows, load, "CPU time" if options.cpu else "a call")
    print(text)
    if options.output:
        write_section(options.output, text, "results")


if __name__ == "__main__":
    main()
