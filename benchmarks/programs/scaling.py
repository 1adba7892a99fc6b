"""How a step scales over devices, and whether a call pays for what is registered and kept.

    python benchmarks/programs/scaling.py --output docs/devices.md

Devices are forced host devices, which share the cores of one machine: a fixed global batch shows
what splitting costs, a fixed batch per device shows that nothing else grows. "Outside torch" is the
share of the process's CPU time that is not spent inside the function.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages.page import measured, table, write_section
from subjects.peers import versions

DEVICES = (1, 2, 4, 8)
GLOBAL, EACH = 512, 128
POPULATIONS = (1, 10, 100, 1_000, 10_000)


def step_seconds(devices: int, rows: int, rounds: int) -> dict[str, float]:
    """A value_and_grad of an MLP over all devices: median seconds, share outside torch."""
    import jax
    import jax.numpy as jnp
    import torch
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    from torch2jax import torch2jax

    torch.set_num_threads(1)
    inside, lock = [0.0], threading.Lock()

    class Timed(torch.autograd.Function):
        """The forward and backward pass, each with a clock around it."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, *ws: torch.Tensor) -> torch.Tensor:
            started = time.thread_time()
            with torch.enable_grad():
                ctx.save_for_backward(x, *ws)
                for w in ws:
                    x = torch.tanh(x @ w)
                y = (x**2).sum()
            with lock:
                inside[0] += time.thread_time() - started
            return y.detach()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            started = time.thread_time()
            x, *ws = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            with torch.enable_grad():
                y = x
                for w in ws:
                    y = torch.tanh(y @ w)
                found = torch.autograd.grad((y**2).sum(), ws, grads[0])
            with lock:
                inside[0] += time.thread_time() - started
            return (None, *found)

    f = torch2jax(lambda x, *ws: Timed.apply(x, *ws))
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))
    local = lambda x, *ws: jax.lax.psum(f(x, *ws), "d")  # noqa: E731
    spread = jax.shard_map(local, mesh=mesh, in_specs=(P("d"), P(), P(), P()), out_specs=P())
    step = jax.jit(jax.value_and_grad(spread, (1, 2, 3)))
    x = jax.device_put(jnp.ones((rows, 256)), NamedSharding(mesh, P("d")))
    ws = jax.device_put([jnp.ones((256, 256)) / 256] * 3, NamedSharding(mesh, P()))
    for _ in range(5):
        jax.block_until_ready(step(x, *ws))
    walls, shares = [], []
    for _ in range(rounds):
        inside[0] = 0.0
        started, worked = time.perf_counter(), time.process_time()
        jax.block_until_ready(step(x, *ws))
        walls.append(time.perf_counter() - started)
        shares.append(1 - inside[0] / (time.process_time() - worked))
    return {"seconds": statistics.median(walls), "outside": statistics.median(shares)}


def call_seconds(rounds: int) -> dict[str, dict[int, float]]:
    """An eager call beside 1 to 10,000 registered functions, and beside as many kept graphs."""
    import jax
    import jax.numpy as jnp
    import torch

    from torch2jax import clear_tape, set_tape_budget, tape_info, torch2jax

    torch.set_num_threads(1)
    x = jnp.ones(16)
    f = torch2jax(lambda x: x + 1)
    value_and_grad = jax.jit(jax.value_and_grad(lambda x: torch2jax(_square)(x).sum()))

    def median(call: Any) -> float:
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            for _ in range(100):
                jax.block_until_ready(call(x))
            times.append((time.perf_counter() - started) / 100)
        return statistics.median(times)

    median(f)
    functions: dict[int, float] = {}
    held: list[Any] = []
    sds = jax.ShapeDtypeStruct((), jnp.float32)
    for count in POPULATIONS:
        while len(held) < count:
            other = torch2jax(functools.partial(torch.mul, other=len(held)), output_shapes=sds)
            jax.jit(other).lower(sds)  # from here on it has an entry, for as long as it lives
            held.append(other)
        functions[count] = median(f)
    held.clear()
    graphs: dict[int, float] = {}
    set_tape_budget(2**33)
    keep = jax.jit(lambda x: jax.vjp(torch2jax(_square), x))
    median(value_and_grad)
    for count in POPULATIONS:
        while tape_info().entries < count:
            jax.block_until_ready(keep(x))
        graphs[count] = median(value_and_grad)
    clear_tape()
    return {"registered functions": functions, "kept graphs": graphs}


def _square(x: Any) -> Any:
    return x * x


def in_process(*arguments: str, devices: int = 1) -> Any:
    flags = f"--xla_force_host_platform_device_count={devices}"
    out = subprocess.run(
        [sys.executable, __file__, "--worker", *arguments],
        env={**os.environ, "XLA_FLAGS": flags},
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    return json.loads(out.splitlines()[-1])


def draw(fixed: list[Any], grown: list[Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same picture is the same file
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, found in (
        (f"{GLOBAL} rows in all", fixed),
        (f"{EACH} rows for each device", grown),
    ):
        axes.plot(DEVICES, [1e3 * r["seconds"] for r in found], marker="o", label=label)
    axes.set(xlabel="forced host devices", ylabel="ms for a step", ylim=(0, None), xticks=DEVICES)
    axes.set_title(f"A step on {os.cpu_count()} cores", loc="left", weight="bold")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="a page whose section is written anew")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, *numbers = arguments.worker
        found = step_seconds if kind == "step" else call_seconds
        print(json.dumps(found(*map(int, numbers))))
        return
    rounds, load = str(arguments.rounds), os.getloadavg()[0]
    fixed = [in_process("step", str(n), str(GLOBAL), rounds, devices=n) for n in DEVICES]
    grown = [in_process("step", str(n), str(EACH * n), rounds, devices=n) for n in DEVICES]
    calls = in_process("call", rounds)

    def cells(found: list[Any]) -> list[str]:
        return [f"{1e3 * r['seconds']:.2f} ({r['outside']:.0%})" for r in found]

    text = "\n".join(
        [
            f"{measured(load, versions())} Medians of {rounds} rounds.",
            "",
            table(
                ["ms for a step (share outside torch)", *map(str, DEVICES)],
                [
                    [f"{GLOBAL} rows in all", *cells(fixed)],
                    [f"{EACH} rows for each device", *cells(grown)],
                ],
            ),
            "",
            table(
                ["µs a call beside so many", *(f"{n:,}" for n in POPULATIONS)],
                [
                    [what, *(f"{1e6 * of[str(n)]:.1f}" for n in POPULATIONS)]
                    for what, of in calls.items()
                ],
            ),
        ]
    )
    print(text)
    if arguments.output:
        text += "\n\n![Milliseconds of a step, by devices](images/scaling.svg)"
        write_section(arguments.output, text, "scaling")
        draw(fixed, grown, arguments.output.parent / "images" / "scaling.svg")


if __name__ == "__main__":
    main()
