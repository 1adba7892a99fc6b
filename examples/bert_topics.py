"""BERT, fine-tuned by JAX on text that ships with SciPy: what is this sentence about?

    python examples/bert_topics.py                   # pre-train, fine-tune, compare, draw
    python examples/bert_topics.py --weights DIR     # fine-tune a checkpoint of yours
    python examples/bert_topics.py --smoke           # a few steps: does everything work?

The text is SciPy's own documentation, a few thousand English sentences. The label of a sentence is
the part of SciPy that it comes from: statistics, signals, optimisation, ... The script learns from
some functions and tests on others. It downloads nothing, not even published weights: Hugging Face's
BERT starts from random weights and learns to fill in hidden words in plain PyTorch. It is then
saved and loaded as any checkpoint is.

Fine-tuning is JAX: `apply, variables = from_module(model)` gives the function, the loss and AdamW
come from optax, dropout takes JAX keys, and the step is one compiled program. PyTorch runs BERT,
and keeps its graph for the backward pass.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import torch
from rich.console import Console
from rich.progress import track
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, logging

from torch2jax import from_module

matplotlib.use("Agg")  # draws to a file: no window, no display needed
import matplotlib.pyplot as plt

TOPICS = ("stats", "signal", "special", "optimize", "linalg", "ndimage", "interpolate", "sparse")
LENGTH = 32
PAD, UNKNOWN, START, END, MASK = range(5)
logging.set_verbosity_error()
logging.disable_progress_bar()
console = Console()


# -- the text --------------------------------------------------------------------------------------


class Data(NamedTuple):
    """The fields are token ids, int32[n, LENGTH], and topics, int32[n]."""

    ids: np.ndarray
    topics: np.ndarray


def sentences(topic: str) -> list[list[str]]:
    """Return the sentences of each function's documentation before its examples and references."""
    module = importlib.import_module(f"scipy.{topic}")
    found, seen = [], set()
    for name in sorted(vars(module)):
        thing = getattr(module, name)
        text = inspect.getdoc(thing) if callable(thing) and not name.startswith("_") else None
        if not text or text in seen:
            continue
        seen.add(text)
        prose = re.split(r"\n(?:Examples|References|See Also)\n-", text)[0]
        prose = re.sub(r"\n *\.\..*|`+|:\w+:|\*+|^ *\w+ : .*$|^-+$", " ", prose, flags=re.M)
        parts = re.split(r"(?<=[.:])\s+|\n\n", prose)
        kept = [part for part in parts if len(words(part)) >= 6]
        if kept:
            found.append(kept[:12])
    return found


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def load(seed: int, most: int) -> tuple[Data, Data, list[str]]:
    """Return training data, test data and the vocabulary. No function is in both data sets."""
    rng = np.random.default_rng(seed)
    parts: tuple[list[tuple[str, int]], ...] = ([], [])
    for label, topic in enumerate(TOPICS):
        functions = sentences(topic)
        for i in rng.permutation(len(functions))[:most]:
            parts[int(rng.random() < 0.2)].extend((s, label) for s in functions[i])
    counts = Counter(word for text, _ in parts[0] for word in words(text))
    vocabulary = [word for word, n in counts.most_common(3000) if n > 1]
    index = {word: i + MASK + 1 for i, word in enumerate(vocabulary)}

    def encode(text: str) -> list[int]:
        ids = [START, *(index.get(w, UNKNOWN) for w in words(text)[: LENGTH - 2]), END]
        return ids + [PAD] * (LENGTH - len(ids))

    train, test = (
        Data(np.array([encode(t) for t, _ in p], np.int32), np.array([y for _, y in p], np.int32))
        for p in parts
    )
    return train, test, vocabulary


# -- PyTorch: pre-training -------------------------------------------------------------------------


def pretrain(ids: np.ndarray, vocabulary: int, steps: int, folder: str) -> None:
    """Learn to fill in hidden words, in plain PyTorch, and save a checkpoint."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=LENGTH,
        pad_token_id=PAD,
    )
    model = BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    texts = torch.from_numpy(ids).long()
    for _ in track(range(steps), "PyTorch fills in words", console=console):
        batch = texts[torch.randint(len(texts), (64,))]
        hidden = (torch.rand(batch.shape) < 0.15) & (batch > MASK)
        out = model(
            input_ids=torch.where(hidden, MASK, batch),
            attention_mask=(batch != PAD).long(),
            labels=torch.where(hidden, batch, -100),
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


# -- JAX: fine-tuning ------------------------------------------------------------------------------


def finetune(
    model: torch.nn.Module, train: Data, test: Data, steps: int, seed: int, name: str
) -> tuple[list[float], list[float]]:
    """Return the losses of all steps and, ten times, the accuracy on the test data."""
    apply, variables = from_module(model)
    schedule = optax.warmup_cosine_decay_schedule(0, 1e-3, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    def logits(params: Any, ids: jax.Array, **mode: Any) -> Any:
        mask = (ids != PAD).astype(jnp.int32)
        return apply({**variables, "params": params}, ids, attention_mask=mask, **mode)

    def loss(params: Any, ids: jax.Array, topics: jax.Array, key: jax.Array) -> jax.Array:
        out, _ = logits(params, ids, train=True, rng=key)
        losses = optax.softmax_cross_entropy_with_integer_labels(out["logits"], topics)
        return losses.mean()

    @jax.jit
    def step(params: Any, state: Any, ids: Any, topics: Any, key: Any) -> tuple[Any, ...]:
        value, grads = jax.value_and_grad(loss)(params, ids, topics, key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def accuracy(params: Any) -> jax.Array:
        return (logits(params, test.ids)["logits"].argmax(-1) == test.topics).mean()

    params, state = variables["params"], optimizer.init(variables["params"])
    rng, keys = np.random.default_rng(seed), jax.random.split(jax.random.key(seed), steps)
    losses, accuracies = [], [float(accuracy(params))]
    started = time.perf_counter()
    for i in track(range(steps), f"JAX learns topics, {name}", console=console):
        rows = rng.integers(len(train.ids), size=32)
        params, state, value = step(params, state, train.ids[rows], train.topics[rows], keys[i])
        losses.append(float(value))
        if (i + 1) % max(steps // 10, 1) == 0:
            accuracies.append(float(accuracy(params)))
    each = 1e3 * (time.perf_counter() - started) / steps
    console.print(
        f"{name}: loss {losses[0]:.2f} to {np.mean(losses[-10:]):.2f}, "
        f"[bold green]{accuracies[-1]:.1%}[/] of unseen sentences right, {each:.0f} ms a step",
        highlight=False,
    )
    return losses, accuracies


def draw(curves: dict[str, list[float]], chance: float, steps: int, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    for (name, curve), colour in zip(curves.items(), ("#2563eb", "#6b7280"), strict=False):
        at = np.linspace(0, steps, len(curve))
        axes.plot(at, [100 * a for a in curve], "o-", color=colour, markersize=4, label=name)
    axes.axhline(100 * chance, color="#d1d5db", linestyle="--", label="the most frequent topic")
    axes.set(xlabel="step of AdamW", ylabel="unseen sentences right, %", ylim=(0, 100))
    axes.set_title("BERT tells what part of SciPy a sentence is about", loc="left", weight="bold")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", help="a folder with a BERT checkpoint for this vocabulary")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default 0)")
    parser.add_argument(
        "--output", type=Path, default=Path("bert_topics.png"), help="where the picture goes"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps, and a check")
    arguments = parser.parse_args(argv)
    pretraining, steps, most = (5, 30, 25) if arguments.smoke else (400, 300, 400)

    torch.manual_seed(arguments.seed)
    train, test, vocabulary = load(arguments.seed, most)
    console.print(
        f"{len(train.ids)} sentences to learn from, {len(test.ids)} to test on, "
        f"{len(vocabulary)} words, {len(TOPICS)} topics"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.weights or scratch
        if arguments.weights is None:
            pretrain(train.ids, len(vocabulary) + MASK + 1, pretraining, folder)
        model = BertForSequenceClassification.from_pretrained(folder, num_labels=len(TOPICS))
    curves = {}
    losses, curves["after pre-training"] = finetune(
        model, train, test, steps, arguments.seed, "after pre-training"
    )
    if not arguments.smoke:
        fresh = BertForSequenceClassification(model.config)
        _, curves["from random weights"] = finetune(
            fresh, train, test, steps, arguments.seed, "from random weights"
        )
    chance = np.bincount(test.topics).max() / len(test.topics)
    draw(curves, float(chance), steps, arguments.output)
    console.print(f"Accuracy step by step: [bold]{arguments.output}[/]", highlight=False)
    assert np.mean(losses[-5:]) < losses[0], "the loss did not fall"
    return 0


if __name__ == "__main__":
    sys.exit(main())
