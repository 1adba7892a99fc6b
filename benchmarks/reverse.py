"""What a call of a JAX function from PyTorch costs, beside JAX alone and PyTorch alone.

    python benchmarks/reverse.py
    python benchmarks/reverse.py --output docs/performance.md

Subjects run in interleaved rounds, in one process; figures are medians of the rounds' microseconds
a call, with the least of them in parentheses. Every call ends when its result is computed. (It is
not named jax2torch.py: that would shadow the peer of that name.)

- JAX: the jitted function, and its jitted forward and backward passes, on arrays
- PyTorch: the same function written in PyTorch
- empty: an autograd.Function that computes nothing, the floor of a Python function under autograd
- ours: jax2torch
- recompute: an autograd.Function around jitted ``f`` and ``jax.vjp`` that converts by the public
  DLPack functions and runs forward again in backward, as one writes it by hand
- jax2torch 0.0.7, torchax: the peers, where they are installed
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch

from torch2jax import jax2torch

BEGIN, END = "<!-- reverse: begin -->", "<!-- reverse: end -->"
BUDGETS = {"no_grad": 15.0, "graph": 25.0, "forward and backward": 20.0}

Subjects = dict[str, Callable[[], Any]]


def f(x: Any, w: Any) -> Any:
    return jnp.tanh(x * w)


def twin(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x * w)


class Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, c: torch.Tensor) -> Any:
        return ctx.saved_tensors


_jitted = jax.jit(f)
_pullback = jax.jit(lambda x, w, c: jax.vjp(f, x, w)[1](c))


class Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return torch.from_dlpack(_jitted(*map(jax.dlpack.from_dlpack, (x.detach(), w.detach()))))

    @staticmethod
    def backward(ctx: Any, c: torch.Tensor) -> Any:
        arrays = map(jax.dlpack.from_dlpack, (*(t.detach() for t in ctx.saved_tensors), c))
        return tuple(map(torch.from_dlpack, _pullback(*arrays)))


def peers() -> dict[str, Callable[..., torch.Tensor]]:
    """What is installed of other ways to call JAX from PyTorch, as functions of two tensors."""
    found: dict[str, Callable[..., torch.Tensor]] = {}
    try:
        from jax2torch import jax2torch as theirs  # type: ignore[import-not-found]

        found[f"jax2torch {importlib.metadata.version('jax2torch')}"] = theirs(f)
    except Exception as error:  # a peer that does not run here is told of, not hidden
        print(f"no figures of the jax2torch package: {type(error).__name__}: {error}")
    try:
        from torchax.interop import jax_view, torch_view  # type: ignore[import-not-found]

        del jax_view
        found[f"torchax {importlib.metadata.version('torchax')}"] = torch_view(jax.jit(f))
    except Exception as error:
        print(f"no figures of torchax: {type(error).__name__}: {error}")
    return found


def cases(n: int) -> dict[str, Subjects]:
    torch.manual_seed(0)
    x, w, c = torch.randn(n, n), torch.randn(n, n), torch.ones(n, n)
    gx, gw = x.clone().requires_grad_(), w.clone().requires_grad_()
    ax, aw, ac = (jnp.array(t.numpy()) for t in (x, w, c))
    ours = jax2torch(f)
    forward = jax.jit(lambda x, w: jax.vjp(f, x, w))
    backward = jax.jit(lambda pull, c: pull(c))

    def no_grad(g: Callable[..., Any]) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return g(gx, gw)

        return call

    def both(g: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(g(gx, gw), (gx, gw), c)

    def jax_both() -> Any:
        y, pull = forward(ax, aw)
        y.block_until_ready()
        return jax.block_until_ready(backward(pull, ac))

    torchs: dict[str, Callable[..., Any]] = {
        "PyTorch": twin,
        "empty": Empty.apply,
        "ours": ours,
        "recompute": Recompute.apply,
        **peers(),
    }
    plain = lambda: _jitted(ax, aw).block_until_ready()  # noqa: E731
    emitting = lambda: jax.block_until_ready(forward(ax, aw)[0])  # noqa: E731
    return {
        "no_grad": {"JAX": plain, **{k: no_grad(g) for k, g in torchs.items()}},
        "graph": {
            "JAX": emitting,
            **{k: (lambda g=g: g(gx, gw)) for k, g in torchs.items()},
        },
        "forward and backward": {"JAX": jax_both, **{k: both(g) for k, g in torchs.items()}},
    }


def measure(subjects: Subjects, rounds: int, calls: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {}
    for name, call in list(subjects.items()):
        try:
            for _ in range(20):
                call()
            samples[name] = []
        except Exception as error:
            print(f"{name} does not run: {type(error).__name__}: {error}")
    for _ in range(rounds):
        for name, series in samples.items():
            call = subjects[name]
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            series.append((time.perf_counter() - begin) / calls * 1e6)
    return samples


def overhead(case: str, samples: dict[str, list[float]]) -> list[float]:
    """Ours above JAX alone, for both passes above an empty Function and JAX, round by round."""
    rows = zip(samples["ours"], samples["JAX"], samples["empty"], strict=True)
    both = case == "forward and backward"
    return [ours - alone - (empty if both else 0) for ours, alone, empty in rows]


def report(n: int, rounds: int, calls: int) -> list[str]:
    lines = []
    for case, subjects in cases(n).items():
        samples = measure(subjects, rounds, calls)
        lines += ["", f"### tanh(x * w) of float32[{n}, {n}]: {case}", ""]
        lines += ["| subject | µs a call |", "| --- | ---: |"]
        for name, series in samples.items():
            lines.append(f"| {name} | {statistics.median(series):.1f} ({min(series):.1f}) |")
        above = overhead(case, samples)
        budget, median = BUDGETS[case], statistics.median(above)
        verdict = "met" if median <= budget else "missed"
        lines += ["", f"Above the floor: {median:.1f} µs; budget {budget:.0f}: {verdict}."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=60, help="interleaved rounds (60)")
    add("--calls", type=int, default=50, help="calls of a subject in a round (50)")
    add("--sizes", type=int, nargs="+", default=[4, 512], help="sizes of the square arguments")
    add("--output", type=Path, metavar="FILE", help="replace the section of FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    text = [
        f"Measured {datetime.date.today()} on {os.cpu_count()} cores of {platform.machine()}, load "
        f"{load:.1f} at the start, torch {torch.__version__}, jax {jax.__version__}, "
        f"{arguments.rounds} rounds."
    ]
    for n in arguments.sizes:
        text += report(n, arguments.rounds, arguments.calls)
    print("\n".join(text))
    if arguments.output:
        page = arguments.output.read_text()
        before, begin, rest = page.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise SystemExit(f"{arguments.output} has no section between {BEGIN} and {END}")
        body = "\n".join(text)
        arguments.output.write_text(f"{before}{begin}\n{body}\n{end}{after}")


if __name__ == "__main__":
    main()
