"""BERT as a JAX program (`lower=True`), beside PyTorch and the same model written in flax.

    python benchmarks/programs/lowering.py --output docs/performance.md

4 layers, 256 wide, 4 heads, 8 x 128 tokens, float32. All subjects have the same weights, and the
benchmark checks that they compute the same loss and gradients. Each round takes one step of every
subject, and each round begins with another; a ratio is the median of the ratios of the rounds.
Every step is waited for. XLA would take every core that it sees and PyTorch has a setting: both get
as many as ``--cores`` says. Tracing is timed in processes of its own, where nothing is cached yet,
and in seconds of the processor, because it is work of one thread.
"""

from __future__ import annotations

import argparse
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages.page import measured, number, write_section

LAYERS, WIDTH, HEADS, WORDS, ROWS, LENGTH = 4, 256, 4, 8192, 8, 128
BUDGETS = {"forward": 1.05, "forward and backward": 1.2}
"""At most, in times of PyTorch."""
TRACING = 0.5
"""Seconds, at most."""
OURS, FLAX, PYTORCH, TORCHAX = "torch2jax, lower=True", "flax", "PyTorch", "torchax"
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


def torchax_loss() -> tuple[Loss, Any, jax.Array]:
    import torchax  # type: ignore[import-not-found]

    model, tokens = torch_model()
    state, fn = torchax.extract_jax(model)
    params = {k: x for k, x in state.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    rest = {k: x for k, x in state.items() if k not in params}

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return (fn({**rest, **params}, (tokens,))["last_hidden_state"] ** 2).mean()

    return loss, params, jnp.asarray(tokens.numpy().astype("int32"))


LOSSES = {OURS: our_loss, FLAX: flax_loss, TORCHAX: torchax_loss}


class Served:
    """Steps of a subject in a process of its own, under its own interpreter."""

    def __init__(self, python: str, subject: str, cores: int) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [python, "-W", "ignore", __file__, "--serve", subject, "--cores", str(cores)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = self._ask("versions")

    def steps(self) -> tuple[Step, Step]:
        return lambda: self._ask("0"), lambda: self._ask("1")

    def norms(self) -> tuple[float, float]:
        loss, norm = self._ask("norms").split()
        return float(loss), float(norm)

    def _ask(self, what: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(what, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("a peer's process ended; its error is above")
        return answer.strip()


def serve(subject: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    fn, params, inputs = LOSSES[subject]()
    steps = jax_steps(fn, params, inputs)
    for line in map(str.strip, sys.stdin):
        if line == "versions":
            names = ("torchax", "jax", "torch")
            reply = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        elif line == "norms":
            reply = "{} {}".format(*norms(fn, params, inputs))
        else:
            steps[int(line)]()
            reply = "done"
        print(reply, file=answers, flush=True)


def jax_steps(loss: Loss, params: Any, tokens: jax.Array) -> tuple[Step, Step]:
    forward = jax.jit(loss)
    both = jax.jit(jax.value_and_grad(loss))
    return (
        lambda: jax.block_until_ready(forward(params, tokens)),
        lambda: jax.block_until_ready(both(params, tokens)),
    )


def norms(fn: Loss, params: Any, inputs: Any) -> tuple[float, float]:
    """The loss, and the norm of all gradients."""
    value, grads = jax.jit(jax.value_and_grad(fn))(params, inputs)
    return float(value), float(sum((g**2).sum() for g in jax.tree.leaves(grads))) ** 0.5


def check(found_by: dict[str, tuple[float, float]]) -> None:
    """Same loss, and the same norm of all gradients."""
    model, tokens = torch_model()
    loss = (model(tokens).last_hidden_state ** 2).mean()
    loss.backward()
    norm = float(sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None)) ** 0.5
    for name, (value, found) in found_by.items():
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
    make = LOSSES[subject]
    model, tokens = torch_model()
    with torch.no_grad():
        model(tokens)  # PyTorch's own start is not counted
    for _ in range(2):
        loss, params, inputs = make()
        for fn in (lambda p, t, f=loss: f(p, t), jax.value_and_grad(lambda p, t, f=loss: f(p, t))):
            start = time.process_time()
            jax.jit(fn).trace(params, inputs)
            print(time.process_time() - start)


def traces(subject: str, python: str, processes: int) -> list[float]:
    """Medians: first forward, first with its backward, next forward, next with its backward."""
    runs = []
    for _ in range(processes):
        command = [python, "-W", "ignore", __file__, "--trace", subject]
        own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" or subject != TORCHAX}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
        runs.append([float(x) for x in done.stdout.split()[-4:]])
    return [statistics.median(column) for column in zip(*runs, strict=True)]


# --- the page ------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def section(rounds: int, processes: int, cores: int, torchax: str | None) -> str:
    load = os.getloadavg()[0]
    losses = {OURS: our_loss(), FLAX: flax_loss()}
    steps = {PYTORCH: torch_steps(), **{k: jax_steps(*v) for k, v in losses.items()}}
    found = {name: norms(*loss) for name, loss in losses.items()}
    names = ("jax", "jaxlib", "torch", "flax", "transformers")
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in names}
    lines = [measured(load, versions), f"Every subject on {cores} of the cores.", ""]
    if torchax:
        served = Served(torchax, TORCHAX, cores)
        steps[TORCHAX], found[TORCHAX] = served.steps(), served.norms()
        lines[1] += f" torchax in an environment of its own: {served.versions}."
    check(found)
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
    for subject in (OURS, FLAX, TORCHAX) if torchax else (OURS, FLAX):
        python = torchax if torchax and subject == TORCHAX else sys.executable
        seconds = traces(subject, python, processes)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--processes", type=int, default=3, help="in which tracing is timed")
    parser.add_argument("--cores", type=int, default=1, help="for all subjects alike")
    parser.add_argument("--output", type=Path, help="replace the section of a page")
    parser.add_argument("--torchax", metavar="PYTHON", help="interpreter that has torchax")
    parser.add_argument("--trace", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])  # XLA's threads too
    torch.set_num_threads(args.cores)
    if args.trace:
        trace(args.trace)
        return
    if args.serve:
        serve(args.serve)
        return
    text = section(args.rounds, args.processes, args.cores, args.torchax)
    print(text)
    if args.output:
        write_section(args.output, text, "lowering")


if __name__ == "__main__":
    main()
