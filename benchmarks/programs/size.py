"""What a call costs against the size of the problem, beside the physical floor.

    python benchmarks/programs/size.py --output docs/performance.md --plot docs/images/size.svg

The floor of a call is an empty FFI call: a handler that returns at once. The floor of bytes is the
memory's bandwidth, measured by a plain copy into memory that is there already. Subjects run in
interleaved rounds; figures are medians. Devices are forced host devices, in processes of their own.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages.page import measured, number, table, write_section
from subjects.cases import Loop
from subjects.peers import Pair, Subject, array

WIDTHS = (1, 3, 10, 30, 100, 300, 1_000)
BYTES = (*(4 * 10**k for k in range(9)), 1_000_000_000)
DEVICES = (1, 2, 4, 8)
CALLS = (1, 10, 100, 1_000)

OURS, FLOOR = "torch2jax", "empty FFI call"
Make = Callable[[int], Callable[[], Any]]
"""A thunk that does so many calls and returns when they are done."""


class Point(NamedTuple):
    """A size, and seconds a call by subject."""

    size: int
    seconds: dict[str, float]


def subjects() -> dict[str, Subject]:
    from subjects.peers import BufferCallback, Empty, Ours

    return {OURS: Ours(), "buffer_callback": BufferCallback(), FLOOR: Empty()}


def medians(makes: dict[str, Make], rounds: int) -> dict[str, float]:
    """Seconds a call. A sample takes about 20 ms, or one call."""
    ready: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, make in makes.items():
        trial = make(1)
        trial()
        once = min(_seconds(trial) for _ in range(3))
        calls = max(1, min(int(0.02 / once), 5_000))
        thunk = make(calls) if calls > 1 else trial
        thunk()
        ready[name] = thunk, calls
    samples: dict[str, list[float]] = {name: [] for name in makes}
    for _ in range(rounds):
        for name, (thunk, calls) in ready.items():
            samples[name].append(_seconds(thunk) / calls)
    return {name: statistics.median(series) for name, series in samples.items()}


def _seconds(thunk: Callable[[], Any]) -> float:
    start = time.perf_counter()
    thunk()
    return time.perf_counter() - start


def by_python(call: Callable[[], Any]) -> Make:
    """Calls from Python, each awaited."""

    def make(calls: int) -> Callable[[], None]:
        def thunk() -> None:
            for _ in range(calls):
                jax.block_until_ready(call())

        return thunk

    return make


# -- the four sizes --------------------------------------------------------------------------------


def arguments(rounds: int) -> list[Point]:
    """An identity function of n arguments, float32[16], in a compiled loop."""
    of = subjects()
    return [
        Point(n, medians({s: functools.partial(Loop(n).make, of[s]) for s in of}, rounds))
        for n in WIDTHS
    ]


PLAIN, OUT, XLA, TORCH = "torch2jax", "torch2jax, out_arg", "jax.jit", "PyTorch"
NEW, COPY = "copy, new memory", "copy"
DOUBLE = Pair(lambda x: torch.mul(x, 2), lambda x: x * 2)


def bytes_(rounds: int, most: int) -> list[Point]:
    """``2 * x`` of so many bytes: it reads them and writes as many, as a copy does."""
    from subjects.peers import Empty

    from torch2jax import torch2jax

    plain = torch2jax(DOUBLE.torch)
    doubled = torch2jax(lambda x, out=None: torch.mul(x, 2, out=out), out_arg="out")
    xla, points = jax.jit(DOUBLE.jax), []
    for size in (s for s in BYTES if s <= most):
        x = jnp.ones(size // 4, jnp.float32)
        source = torch.ones(size // 4)
        target = torch.zeros(size // 4)
        calls = {
            PLAIN: by_python(functools.partial(plain, x)),
            OUT: by_python(functools.partial(doubled, x)),
            XLA: by_python(functools.partial(xla, x)),
            TORCH: by_python(functools.partial(DOUBLE.torch, source)),
            NEW: by_python(source.clone),
            COPY: by_python(functools.partial(target.copy_, source)),
        }
        if size == BYTES[0]:
            calls[FLOOR] = by_python(functools.partial(Empty().wrap(DOUBLE, (x,)), x))
        found = medians(calls, rounds if size < 10**8 else max(3, rounds // 5))
        if points:
            found[FLOOR] = points[0].seconds[FLOOR]
        points.append(Point(size, found))
        del x, source, target, calls
    return points


def graph(rounds: int) -> list[Point]:
    """n calls in one compiled program, each fed by the one before; seconds a call."""
    points = []
    for n in CALLS:
        seconds: dict[str, Make] = {}
        for name, subject in subjects().items():
            f = subject.wrap(Loop.identity, [array(16)])

            def chain(x: jax.Array, f: Any = f, n: int = n) -> jax.Array:
                for _ in range(n):
                    x = f(x)
                return x

            seconds[name] = by_python(functools.partial(jax.jit(chain), array(16)))
        points.append(Point(n, {s: v / n for s, v in medians(seconds, rounds).items()}))
    return points


def devices(rounds: int) -> list[Point]:
    """A loop of calls on each of n devices at once; seconds for a call of every device."""
    points = []
    for n in DEVICES:
        out = subprocess.run(
            [sys.executable, __file__, "--on-devices", "--rounds", str(rounds)],
            env={**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={n}"},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        points.append(Point(n, json.loads(out.splitlines()[-1])))
    return points


def on_devices(rounds: int) -> dict[str, float]:
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.ones((count * 16,)), NamedSharding(mesh, P("d")))

    def make(f: Any, calls: int) -> Callable[[], Any]:
        def local(x: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, calls, lambda _, x: f(x), x)

        # A plain FFI call has no rule for varying axes: both are called without that check.
        spread = jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)
        program = jax.jit(spread)
        return lambda: jax.block_until_ready(program(x))

    of = subjects()
    wrapped = {s: of[s].wrap(Loop.identity, [array(16)]) for s in (OURS, FLOOR)}
    return medians({s: functools.partial(make, f) for s, f in wrapped.items()}, rounds)


# -- what is written -------------------------------------------------------------------------------


class Section(NamedTuple):
    title: str
    axis: str
    points: list[Point]

    def floor(self, point: Point) -> float:
        """An empty FFI call; for bytes a copy after it."""
        return point.seconds[FLOOR] + point.seconds.get(COPY, 0.0)

    def ratio(self, point: Point) -> float:
        return point.seconds[OURS] / self.floor(point)

    def table(self) -> str:
        names = list(self.points[-1].seconds)
        head = [f"µs a call, by {self.axis}", *names, f"{OURS} / floor"]
        rows = [
            [
                f"{p.size:,}",
                *(number(p.seconds[n] * 1e6) for n in names),
                f"{number(self.ratio(p))} x",
            ]
            for p in self.points
        ]
        return f"### {self.title}\n\n{table(head, rows)}"


def bandwidth(points: list[Point]) -> str:
    """Bytes read and written a second, where neither caches nor the call count."""
    largest = points[-1]
    rates = {n: 2 * largest.size / largest.seconds[n] / 1e9 for n in (COPY, NEW, OUT, PLAIN)}
    told = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
    return f"At {largest.size:,} bytes, GB read and written a second: {told}."


def markdown(sections: list[Section], load: float, plot: str | None) -> str:
    from subjects.peers import versions

    parts = [measured(load, versions()), ""]
    for section in sections:
        parts += [section.table(), ""]
        if section.axis == "bytes":
            parts += [bandwidth(section.points), ""]
    if plot:
        parts += [f"![What a call costs against its size, beside the floor]({plot})", ""]
    return "\n".join(parts).rstrip()


def draw(sections: list[Section], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "size"  # the same picture is the same file
    figure, plots = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    for section, axes in zip(sections, plots.flat, strict=True):
        sizes = [p.size for p in section.points]
        ours = [p.seconds[OURS] * 1e6 for p in section.points]
        floor = [section.floor(p) * 1e6 for p in section.points]
        axes.plot(sizes, ours, marker="o", color="#2563eb", label=OURS)
        axes.plot(sizes, floor, marker="o", color="#6b7280", label="floor")
        axes.fill_between(sizes, floor, ours, color="#2563eb", alpha=0.1, lw=0)
        for size, high, point in zip(sizes, ours, section.points, strict=True):
            axes.annotate(
                f"{number(section.ratio(point))} x",
                (size, high),
                (0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axes.set(xscale="log", yscale="log", xlabel=section.axis, ylabel="µs a call")
        axes.minorticks_off()
        if len(sizes) < 5:
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.margins(y=0.18)
        axes.set_title(section.title, loc="left", weight="bold", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    plots[0, 0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=20, help="interleaved rounds (20)")
    add("--bytes", type=int, default=BYTES[-1], help="the largest argument (1,000,000,000)")
    add("--output", type=Path, metavar="FILE", help="replace the section of FILE")
    add("--plot", type=Path, metavar="FILE", help="draw the four sizes")
    add("--on-devices", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # torch warns of the callback's read-only arrays
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(1)
    if options.on_devices:
        print(json.dumps(on_devices(options.rounds)))
        return
    load = os.getloadavg()[0]
    sections = [
        Section("Arguments, in a compiled loop", "arguments", arguments(options.rounds)),
        Section(
            "Bytes of one argument, from Python", "bytes", bytes_(options.rounds, options.bytes)
        ),
        Section("Devices, a call on each at once", "devices", devices(options.rounds)),
        Section("Calls in one compiled program", "calls", graph(options.rounds)),
    ]
    plot = None
    if options.plot:
        plot = os.path.relpath(options.plot, (options.output or options.plot).parent)
    text = markdown(sections, load, plot)
    print(text)
    if options.plot:
        draw(sections, options.plot)
    if options.output:
        write_section(options.output, text, "size")


if __name__ == "__main__":
    main()
