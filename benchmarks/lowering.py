"""BERT as a JAX program (`lower=True`), beside PyTorch and the same model written in flax.

    python benchmarks/lowering.py --output docs/performance.md

4 layers, 256 wide, 4 heads, 8 x 128 tokens, float32. All subjects have the same weights, and the
benchmark checks that they compute the same loss and gradients. Each round takes one step of every
subject, and each round begins with another; a ratio is the median of the ratios of the rounds.
Every step is waited for. XLA would take every core that it sees and PyTorch has a setting: both get
as many as ``--cores`` says. Tracing is timed in processes of its own, where nothing is cached yet,
and in seconds of the processor, because it is work of one thread.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import torch
import transformers
from page import number, write_section

LAYERS, WIDTH, HEADS, WORDS, ROWS, LENGTH = 4, 256, 4, 8192, 8, 128
BUDGETS = {"forward": 1.05, "forward and backward": 1.2}
"""At most, in times of PyTorch."""
TRACING = 0.5
"""Seconds, at most."""
OURS, FLAX, PYTORCH = "torch2jax, lower=True", "flax", "PyTorch"
WARM_UP = 2

Step = Callable[[], Any]


def torch_model() -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, vocab_size=WORDS, max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    return model, torch.randint(0, WORDS, (ROWS, LENGTH))


# --- the same model in flax ----------------------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def heads(name: str) -> jax.Array:
            return nn.Dense(WIDTH, name=name)(x).reshape(ROWS, LENGTH, HEADS, -1)

        mixed = jax.nn.dot_product_attention(heads("query"), heads("key"), heads("value"))
        out = nn.Dense(WIDTH, name="out")(mixed.reshape(x.shape))
        x = nn.LayerNorm(epsilon=1e-12, name="norm1")(x + out)
        y = nn.gelu(nn.Dense(4 * WIDTH, name="up")(x), approximate=False)
        return nn.LayerNorm(epsilon=1e-12, name="norm2")(x + nn.Dense(WIDTH, name="down")(y))


class Bert(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(WORDS, WIDTH, name="words")(tokens)
        x = x + nn.Embed(2, WIDTH, name="types")(jnp.zeros_like(tokens))
        x = x + nn.Embed(LENGTH, WIDTH, name="places")(jnp.arange(LENGTH))
        x = nn.LayerNorm(epsilon=1e-12, name="norm")(x)
        for i in range(LAYERS):
            x = Block(name=f"layer{i}")(x)
        return x


_BLOCK = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "out": "attention.output.dense", "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense", "down": "output.dense", "norm2": "output.LayerNorm",
}  # fmt: skip
_OUTER = {
    "words": "word_embeddings", "types": "token_type_embeddings", "places": "position_embeddings",
    "norm": "LayerNorm",
}  # fmt: skip


def flax_weights(model: Any) -> dict[str, Any]:
    state = {k: v.numpy() for k, v in model.state_dict().items()}

    def layer(ours: str, theirs: str) -> dict[str, Any]:
        weight = state[f"{theirs}.weight"]
        if ours in ("words", "types", "places"):
            return {"embedding": weight}
        bias = state[f"{theirs}.bias"]
        norm = ours.startswith("norm")
        return {"scale": weight, "bias": bias} if norm else {"kernel": weight.T, "bias": bias}

    tree: dict[str, Any] = {k: layer(k, f"embeddings.{v}") for k, v in _OUTER.items()}
    for i in range(LAYERS):
        tree[f"layer{i}"] = {k: layer(k, f"encoder.layer.{i}.{v}") for k, v in _BLOCK.items()}
    return jax.tree.map(jnp.asarray, tree)


# --- the steps -----------------------------------------------------------------------------------


def torch_steps() -> tuple[Step, Step]:
    model, tokens = torch_model()

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return (model(tokens).last_hidden_state ** 2).mean()

    def both() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = (model(tokens).last_hidden_state ** 2).mean()
        loss.backward()
        return loss

    return forward, both


Loss = Callable[[Any, jax.Array], jax.Array]


def our_loss() -> tuple[Loss, Any, jax.Array]:
    from torch2jax import from_module

    model, tokens = torch_model()
    apply, variables = from_module(model, lower=True)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        out = apply({**variables, "params": params}, input_ids=tokens)
        return (out["last_hidden_state"] ** 2).mean()

    return loss, variables["params"], jnp.asarray(tokens.numpy().astype("int32"))


def flax_loss() -> tuple[Loss, Any, jax.Array]:
    model, tokens = torch_model()

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return (Bert().apply({"params": params}, tokens) ** 2).mean()

    return loss, flax_weights(model), jnp.asarray(tokens.numpy().astype("int32"))


def jax_steps(loss: Loss, params: Any, tokens: jax.Array) -> tuple[Step, Step]:
    forward = jax.jit(loss)
    both = jax.jit(jax.value_and_grad(loss))
    return (
        lambda: jax.block_until_ready(forward(params, tokens)),
        lambda: jax.block_until_ready(both(params, tokens)),
    )


def check(params: dict[str, Any]) -> None:
    """Same loss, and the same norm of all gradients."""
    model, tokens = torch_model()
    loss = (model(tokens).last_hidden_state ** 2).mean()
    loss.backward()
    norm = float(sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None)) ** 0.5
    for name, (fn, weights, inputs) in params.items():
        value, grads = jax.jit(jax.value_and_grad(fn))(weights, inputs)
        found = float(sum((g**2).sum() for g in jax.tree.leaves(grads))) ** 0.5
        if abs(value - loss.item()) > 1e-4 or abs(found - norm) > 1e-3 * norm:
            raise SystemExit(f"{name}: loss {value}, norm {found}; PyTorch {loss.item()}, {norm}")


def timed(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each subject in each round."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for n in range(WARM_UP + rounds):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            start = time.perf_counter()
            steps[name]()
            if n >= WARM_UP:
                samples[name].append((time.perf_counter() - start) * 1e3)
    return samples


# --- tracing -------------------------------------------------------------------------------------


def trace(subject: str) -> None:
    """Prints seconds: the first trace of this process, and that of an equal model after it."""
    make = our_loss if subject == OURS else flax_loss
    model, tokens = torch_model()
    with torch.no_grad():
        model(tokens)  # PyTorch's own start is not counted
    for _ in range(2):
        loss, params, inputs = make()
        for fn in (lambda p, t, f=loss: f(p, t), jax.value_and_grad(lambda p, t, f=loss: f(p, t))):
            start = time.process_time()
            jax.jit(fn).trace(params, inputs)
            print(time.process_time() - start)


def traces(subject: str, processes: int) -> list[float]:
    """Medians: first forward, first with its backward, next forward, next with its backward."""
    runs = []
    for _ in range(processes):
        command = [sys.executable, "-W", "ignore", __file__, "--trace", subject]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append([float(x) for x in done.stdout.split()[-4:]])
    return [statistics.median(column) for column in zip(*runs, strict=True)]


# --- the page ------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def section(rounds: int, processes: int) -> str:
    load = os.getloadavg()[0]
    losses = {OURS: our_loss(), FLAX: flax_loss()}
    check(losses)
    steps = {PYTORCH: torch_steps(), **{k: jax_steps(*v) for k, v in losses.items()}}
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "jaxlib", "torch", "flax", "transformers")
    )
    lines = [
        f"Measured {datetime.datetime.now(datetime.UTC):%Y-%m-%d} on {processor()}, "
        f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {platform.system()}",
        f"{platform.machine()} (load {load:.1f} at the start; threads of PyTorch: "
        f"{torch.get_num_threads()}), by",
        f"`python benchmarks/lowering.py --rounds {rounds} --output docs/performance.md`.",
        f"Python {platform.python_version()}, {versions}.",
        "",
    ]
    for i, what in enumerate(BUDGETS):
        samples = timed({name: pair[i] for name, pair in steps.items()}, rounds)
        base = samples[PYTORCH]
        ratios = {
            name: statistics.median(a / b for a, b in zip(times, base, strict=True))
            for name, times in samples.items()
        }
        rows = [
            [
                name,
                number(statistics.median(times)),
                number(min(times)),
                f"{ratios[name]:.2f}",
                f"{min(times) / min(base):.2f}",
            ]
            for name, times in samples.items()
        ]
        head = [what, "ms, median", "ms, least", "x PyTorch", "x PyTorch, least"]
        met = "met" if ratios[OURS] <= BUDGETS[what] else "missed"
        lines += table(head, rows)
        lines += [f"Budget: at most {BUDGETS[what]} x PyTorch; {ratios[OURS]:.2f} x: {met}.", ""]
    rows, ours = [], []
    for subject in (OURS, FLAX):
        seconds = traces(subject, processes)
        ours = ours or seconds
        rows.append([subject, *(f"{s:.2f}" for s in seconds)])
    head = ["tracing, s of CPU", "first: forward", "and backward", "next: forward", "and backward"]
    lines += table(head, rows)
    met = "met" if ours[0] <= TRACING else "missed"
    lines.append(
        f"Budget: the first forward at most {TRACING} s; {ours[0]:.2f} s: {met}. Medians of "
        f"{processes} processes."
    )
    return "\n".join(lines)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--processes", type=int, default=3, help="in which tracing is timed")
    parser.add_argument("--cores", type=int, default=1, help="for all subjects alike")
    parser.add_argument("--output", type=Path, help="replace the section of a page")
    parser.add_argument("--trace", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])  # XLA's threads too
    torch.set_num_threads(args.cores)
    if args.trace:
        trace(args.trace)
        return
    text = section(args.rounds, args.processes)
    print(text)
    if args.output:
        write_section(args.output, text, "lowering")


if __name__ == "__main__":
    main()
