"""What a training step costs: PyTorch alone, through torch2jax, and through another bridge.

    python benchmarks/programs/training.py --peers PYTHON --output docs/performance.md

Each round takes one step of every subject, and each round begins with another subject: what else
the machine does then meets all of them. A ratio is the median of the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

HERE = Path(__file__).resolve().parent
PEER = "wrap_torch2jax"
NATIVE, TAPE, RECOMPUTE = "PyTorch", "torch2jax, tape", "torch2jax, recompute"
BUDGET = 1.05
"""At most: the tape's step, in steps of PyTorch alone."""
WARM_UP = 3
DIGITS_ROUNDS = 20
"""Rounds of the digits for each round of the transformer: they are that much shorter."""

Step = Callable[[], float]
"""One training step, complete when it returns; returns the loss."""
Tree = dict[str, jax.Array]


# --- the subjects --------------------------------------------------------------------------------


def transformer() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
    net = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return net, torch.randn(8, 128, 256)


@dataclass(frozen=True)
class Gradients:
    """The transformer's step, and what it last returned: the loss and the gradients' norm."""

    step: Step
    check: Callable[[], tuple[float, float]]


def native_gradients() -> Gradients:
    net, x = transformer()

    def step() -> float:
        net.zero_grad(set_to_none=True)
        loss = (net(x) ** 2).mean()
        loss.backward()
        return loss.item()

    def check() -> tuple[float, float]:
        loss = step()
        return loss, float(sum((p.grad**2).sum() for p in net.parameters())) ** 0.5

    return Gradients(step, check)


def jax_gradients(forward: Callable[[Tree], jax.Array], params: Tree) -> Gradients:
    f = jax.jit(jax.value_and_grad(lambda params: (forward(params) ** 2).mean()))

    def step() -> float:
        return float(jax.block_until_ready(f(params))[0])

    def check() -> tuple[float, float]:
        loss, grads = f(params)
        return float(loss), float(sum((g**2).sum() for g in jax.tree.leaves(grads))) ** 0.5

    return Gradients(step, check)


def our_gradients(residuals: str) -> Gradients:
    from torch2jax import from_module

    net, x = transformer()
    apply, variables = from_module(net, residuals=residuals)
    inputs = jnp.asarray(x.numpy())
    return jax_gradients(
        lambda params: apply({**variables, "params": params}, inputs, train=True)[0],
        variables["params"],
    )


def peer_gradients() -> Gradients:
    # It builds its extension at first use, so ninja must be on the path.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    from wrap_torch2jax import torch2jax  # type: ignore[import-not-found]

    net, x = transformer()
    tensors = {name: p.detach() for name, p in net.named_parameters()}

    def forward(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, params, (x,))

    apply, inputs = torch2jax(forward, tensors, x, depth=1), jnp.asarray(x.numpy())
    params = {name: jnp.asarray(t.numpy()) for name, t in tensors.items()}
    return jax_gradients(lambda params: apply(params, inputs), params)


def digits_steps() -> dict[str, Step]:
    """The network and the batches of ``examples/train_digits.py``; every step takes the next."""
    sys.path.insert(0, str(HERE.parents[1] / "examples"))
    import itertools

    import optax
    from train_digits import LEARNING_RATE, batches, load, make_model, make_native_step

    from torch2jax import from_module

    torch.manual_seed(0)
    model = make_model()
    arrays = list(batches(load(0), np.random.default_rng(0)))
    torch_batches = itertools.cycle(
        [(torch.from_numpy(x), torch.from_numpy(y).long()) for x, y in arrays]
    )
    jax_batches = itertools.cycle([(jnp.asarray(x), jnp.asarray(y)) for x, y in arrays])

    apply, variables = from_module(model, residuals="tape")
    optimizer = optax.adam(LEARNING_RATE)

    @jax.jit
    def update(params: Tree, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss_of(params: Tree) -> jax.Array:
            logits, _ = apply({**variables, "params": params}, images, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    params, state = variables["params"], optimizer.init(variables["params"])

    def ours() -> float:
        nonlocal params, state
        params, state, loss = jax.block_until_ready(update(params, state, *next(jax_batches)))
        return float(loss)

    native_step = make_native_step(model)
    return {NATIVE: lambda: native_step(*next(torch_batches)), TAPE: ours}


# --- the peer's process --------------------------------------------------------------------------


def serve() -> None:
    """Answer on standard output: ``versions`` and ``check`` once, then a step for each line."""
    answers = os.fdopen(os.dup(1), "w")  # libraries print while they build themselves
    os.dup2(2, 1)
    from subjects.peers import versions

    gradients = peer_gradients()
    first = {"versions": versions(), "check": gradients.check()}
    print(json.dumps(first), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(milliseconds(gradients.step)), file=answers, flush=True)


class Peer:
    """``serve`` under another interpreter; a step's time is taken there."""

    def __init__(self, python: str, threads: int) -> None:
        from overhead import environment

        self._process = subprocess.Popen(
            [python, str(HERE / "training.py"), "--serve", f"--threads={threads}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(python),
        )
        first = self._read()
        self.versions: dict[str, str] = first["versions"]
        self.check: tuple[float, float] = tuple(first["check"])

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the peer's process ended; its error is above")
        return json.loads(line)

    def milliseconds(self) -> float:
        assert self._process.stdin is not None
        print("step", file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def peer(python: str | None, threads: int) -> Iterator[Peer | None]:
    if python is None:
        yield None
        return
    with contextlib.closing(Peer(python, threads)) as process:
        yield process


# --- the rounds ----------------------------------------------------------------------------------


def milliseconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


Timers = dict[str, Callable[[], float]]
Samples = dict[str, list[float]]
"""By subject: milliseconds a step, one figure a round."""


def timers(steps: dict[str, Step]) -> Timers:
    return {name: lambda step=step: milliseconds(step) for name, step in steps.items()}


def time_rounds(of: Timers, rounds: int, track: Callable[..., Any], title: str) -> Samples:
    names = list(of)
    for name in names * WARM_UP:
        of[name]()
    samples: Samples = {name: [] for name in names}
    for number in track(range(rounds), description=title):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(of[name]())
    return samples


def same(checks: dict[str, tuple[float, float]]) -> None:
    """Every subject computes the same loss and gradients."""
    for name, found in checks.items():
        if not np.allclose(found, checks[NATIVE], rtol=1e-4):
            raise SystemExit(f"{name} computes {found}, PyTorch alone {checks[NATIVE]}")


# --- what comes out ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Milliseconds, and steps of PyTorch alone: the medians, and from the least of the rounds."""

    median: float
    least: float
    ratio: float
    least_ratio: float


@dataclass(frozen=True)
class Table:
    title: str
    rows: dict[str, Row]


def summary(title: str, samples: Samples) -> Table:
    native = samples[NATIVE]
    rows = {}
    for name, series in samples.items():
        ratios = [a / b for a, b in zip(series, native, strict=True)]
        rows[name] = Row(
            statistics.median(series),
            min(series),
            statistics.median(ratios),
            min(series) / min(native),
        )
    return Table(title, rows)


def verdict(row: Row) -> str:
    """ "borderline": the median of the ratios and the ratio of the least disagree."""
    met = row.ratio <= BUDGET, row.least_ratio <= BUDGET
    return "met" if all(met) else "borderline" if any(met) else "missed"


def budget_line(table: Table) -> str:
    row = table.rows[TAPE]
    return (
        f"Budget, the transformer with the tape: at most {BUDGET} x PyTorch; "
        f"measured {row.ratio:.3f} x ({row.least_ratio:.3f} x): {verdict(row)}."
    )


HEAD = ["subject", "ms, median", "ms, least", "x PyTorch", "x PyTorch, least"]


def cells(table: Table) -> list[list[str]]:
    from pages.page import number

    return [
        [name, number(r.median), number(r.least), f"{r.ratio:.3f}", f"{r.least_ratio:.3f}"]
        for name, r in table.rows.items()
    ]


def print_tables(tables: list[Table]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    for table in tables:
        shown = RichTable(title=table.title)
        for i, column in enumerate(HEAD):
            shown.add_column(column, justify="right" if i else "left")
        for row in cells(table):
            shown.add_row(*row)
        console.print(shown)
    colour = {"met": "green", "borderline": "yellow"}.get(verdict(tables[0].rows[TAPE]), "red")
    console.print(budget_line(tables[0]), style=colour, highlight=False, markup=False)


def markdown(facts: dict[str, Any], tables: list[Table], plot: str | None) -> str:
    from pages.page import table as markdown_table

    parts = [
        f"Measured {facts['date']} on {facts['machine']} (load {facts['load']:.1f} at the start,",
        f"{facts['load_end']:.1f} at the end; threads of PyTorch: {facts['threads']}), by",
        f"`{facts['command']}`.",
        "",
    ]
    for name, versions in facts["versions"].items():
        parts.append(f"- {name}: " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    for table in tables:
        parts += ["", f"### {table.title}", "", markdown_table(HEAD, cells(table))]
        if table is tables[0]:
            parts += ["", budget_line(table)]
    if plot:
        parts += ["", f"![Milliseconds of a training step, by subject]({plot})"]
    return "\n".join(parts)


def draw(tables: list[Table], path: Path, narrow: bool = False) -> None:
    """Draw the medians; ``narrow`` is for the width of a phone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {NATIVE: "#6b7280", TAPE: "#2563eb", RECOMPUTE: "#93c5fd", PEER: "#d97706"}
    heights = [len(table.rows) + 0.8 for table in tables]
    width, height, dpi = (3.9, 0.45, 200) if narrow else (9, 0.62, 120)
    figure, plots = plt.subplots(
        len(tables), 1, figsize=(width, height * sum(heights)), dpi=dpi, height_ratios=heights,
        layout="constrained",
    )  # fmt: skip
    size = 8 if narrow else 10
    for table, axes in zip(tables, plots, strict=True):
        names = list(table.rows)
        bars = axes.barh(
            names, [table.rows[n].median for n in names], color=[colours[n] for n in names]
        )
        labels = [f"{table.rows[n].median:.3g} ms, {table.rows[n].ratio:.2f} x" for n in names]
        axes.bar_label(bars, labels, padding=4, fontsize=size)
        axes.invert_yaxis()
        axes.margins(x=0.6 if narrow else 0.25)
        axes.set_title(
            textwrap.fill(table.title, 34) if narrow else table.title,
            loc="left", weight="bold", fontsize=size,
        )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0, labelsize=size)
        axes.tick_params(axis="x", labelsize=size)
    what = "milliseconds a step, median; x: median of the rounds' ratios to PyTorch"
    plots[-1].set_xlabel(what.replace("; ", "\n") if narrow else what, fontsize=size)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--peers", metavar="PYTHON", help="interpreter of the peers' environment (see README.md)")
    add("--rounds", type=int, default=12, help="rounds of the transformer, at least 3 (12)")
    add("--threads", type=int, default=1, help="threads of PyTorch, in every process (1)")
    add("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    add("--output", type=Path, metavar="FILE", help="replace the training section of FILE")
    add("--plot", type=Path, metavar="FILE", help="draw the medians")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 3:
        parser.error("--rounds must be at least 3")
    return args


def main() -> None:
    warnings.simplefilter("ignore")
    jax.config.update("jax_platforms", "cpu")  # where PyTorch's side runs
    args = arguments()
    torch.set_num_threads(args.threads)  # before any work: each thread of XLA reads it once
    if args.serve:
        serve()
        return
    from pages.page import machine, shown_command, write_section
    from rich.progress import Progress
    from subjects.peers import versions

    load = os.getloadavg()[0]
    with Progress(transient=True) as progress, peer(args.peers, args.threads) as other:
        gradients = {
            NATIVE: native_gradients(),
            TAPE: our_gradients("tape"),
            RECOMPUTE: our_gradients("recompute"),
        }
        checks = {name: g.check() for name, g in gradients.items()}
        of = timers({name: g.step for name, g in gradients.items()})
        found = {"torch2jax": versions()}
        if other:
            of[PEER], checks[PEER] = other.milliseconds, other.check
            found["peers"] = other.versions
        same(checks)
        samples = {
            "transformer": time_rounds(of, args.rounds, progress.track, "transformer"),
            "digits": time_rounds(
                timers(digits_steps()), args.rounds * DIGITS_ROUNDS, progress.track, "digits"
            ),
        }
    titles = {
        "transformer": "value_and_grad of a transformer: 4 layers, 256 wide, 8 x 128 tokens",
        "digits": "A step of Adam: the CNN of the digits, 64 images",
    }
    tables = [
        summary(f"{titles[name]}, {len(of_row[NATIVE])} rounds", of_row)
        for name, of_row in samples.items()
    ]
    facts = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "load": load,
        "load_end": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "versions": found,
        "command": shown_command(),
    }
    print_tables(tables)
    if args.json:
        raw = {"tables": [asdict(t) for t in tables], "samples_ms": samples}
        args.json.write_text(json.dumps({**facts, **raw}, indent=1) + "\n")
    if args.plot:
        draw(tables, args.plot)
        draw(tables, args.plot.with_stem(f"{args.plot.stem}-narrow"), narrow=True)
    if args.output:
        plot = os.path.relpath(args.plot, args.output.parent) if args.plot else None
        write_section(args.output, markdown(facts, tables, plot), "training")


if __name__ == "__main__":
    main()
