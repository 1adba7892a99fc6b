"""A frozen PyTorch network under a Flax head: learn new digits from a handful of each.

    python examples/feature_extractor.py             # learn, compare, draw
    python examples/feature_extractor.py --smoke     # a few seconds: does everything work?

A convolutional network learns the digits 0 to 4 in plain PyTorch. Then it is frozen and becomes
one layer of a Flax model, `TorchModule(body)`. The head of that model learns the digits 5 to 9,
which the network has never seen, by optax under `nnx.jit`. Nobody has to convert weights. A frozen
parameter is no `nnx.Param`, so neither `nnx.grad` nor the optimizer touches it, and PyTorch runs no
backward pass. For comparison the same head learns from the pixels themselves.

The data are scikit-learn's scans of handwritten digits, 8 x 8 pixels each. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import matplotlib
import numpy as np
import optax
import torch
from flax import nnx
from rich.console import Console
from rich.progress import Progress, track
from sklearn.datasets import load_digits
from torch import nn

from torch2jax.flax import TorchModule

matplotlib.use("Agg")  # draws to a file: no window, no display needed
import matplotlib.pyplot as plt

FEATURES = 32 * 4 * 4
console = Console()


def load() -> tuple[np.ndarray, np.ndarray]:
    """Return images, float32[n, 1, 8, 8] in [0, 1], and labels, int32[n]."""
    images, labels = load_digits(return_X_y=True)
    return (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8), labels.astype(np.int32)


# -- PyTorch: a network that knows 0 to 4 ----------------------------------------------------------


def pretrain(images: np.ndarray, labels: np.ndarray, epochs: int) -> nn.Module:
    """Train a classifier, and return its convolutional part."""
    body = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    model = nn.Sequential(body, nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    data = torch.utils.data.TensorDataset(torch.from_numpy(images), torch.from_numpy(labels).long())
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)
    for _ in track(range(epochs), "PyTorch learns 0 to 4", console=console):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return body


# -- Flax: a head that learns 5 to 9 ---------------------------------------------------------------


class Classifier(nnx.Module):
    """The body may be PyTorch's, and the linear head is Flax's."""

    def __init__(self, body: Callable[[jax.Array], jax.Array], size: int, rngs: nnx.Rngs) -> None:
        self.body = body
        self.head = nnx.Linear(size, 5, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.head(self.body(images))


@nnx.jit
def step(model: Classifier, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    """Take one step on the whole training set, and return the loss before it."""

    def loss(model: Classifier) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


@nnx.jit
def accuracy(model: Classifier, x: jax.Array, y: jax.Array) -> jax.Array:
    return (model(x).argmax(axis=1) == y).mean()


def learn(
    name: str, model: Classifier, train: tuple, test: tuple, steps: int
) -> tuple[list[float], list[float]]:
    """Train the head, and return losses and test accuracies, one for each step."""
    model.eval()  # the body's BatchNorm keeps its statistics; the head has no modes
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    losses, accuracies = [], []
    with Progress(console=console) as progress:
        bar = progress.add_task(f"Flax learns 5 to 9, {name}", total=steps)
        for _ in range(steps):
            losses.append(float(step(model, optimizer, *train)))
            accuracies.append(float(accuracy(model, *test)))
            progress.advance(bar)
    return losses, accuracies


def draw(curves: dict[str, list[float]], shots: int, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 4.2), dpi=120, layout="constrained")
    for (name, curve), colour in zip(curves.items(), ("#2563eb", "#6b7280"), strict=True):
        axes.plot(range(1, len(curve) + 1), [100 * a for a in curve], color=colour, label=name)
        axes.annotate(
            f"{curve[-1]:.1%}",
            (len(curve), 100 * curve[-1]),
            xytext=(4, -3),
            textcoords="offset points",
            color=colour,
            weight="bold",
        )
    axes.set(xlabel="step of AdamW", ylabel="accuracy on unseen scans of 5 to 9, %")
    axes.set_title(
        f"A Flax head learns from {shots} scans of each digit", loc="left", weight="bold"
    )
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--shots", type=int, default=20, help="scans of each new digit (default 20)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default 0)")
    parser.add_argument(
        "--output", type=Path, default=Path("feature_extractor.png"), help="where the picture goes"
    )
    parser.add_argument("--smoke", action="store_true", help="a short training, and a check")
    arguments = parser.parse_args(argv)
    epochs, steps = (3, 40) if arguments.smoke else (15, 150)

    torch.manual_seed(arguments.seed)
    images, labels = load()
    old = labels < 5
    body = pretrain(images[old], labels[old], epochs)
    body.requires_grad_(False)

    rows = np.random.default_rng(arguments.seed).permutation(np.flatnonzero(~old))
    shown = np.concatenate(
        [rows[labels[rows] == digit][: arguments.shots] for digit in range(5, 10)]
    )
    unseen = np.setdiff1d(rows, shown)
    train, test = ((images[part], labels[part] - 5) for part in (shown, unseen))

    frozen = Classifier(TorchModule(body), FEATURES, nnx.Rngs(arguments.seed))
    pixels = Classifier(lambda x: x.reshape(len(x), -1), 64, nnx.Rngs(arguments.seed))
    losses, features = learn("from PyTorch's features", frozen, train, test, steps)
    _, raw = learn("from pixels", pixels, train, test, steps)

    console.print(
        f"{len(shown)} scans to learn from, {len(unseen)} to test on: "
        f"[bold green]{features[-1]:.1%}[/bold green] right from the frozen network's features, "
        f"{raw[-1]:.1%} from pixels",
        highlight=False,
    )
    draw(
        {"on a frozen PyTorch network": features, "on pixels": raw},
        arguments.shots,
        arguments.output,
    )
    console.print(f"Accuracy step by step: [bold]{arguments.output}[/bold]", highlight=False)
    if arguments.smoke:
        assert losses[-1] < 0.5 * losses[0], f"the loss did not fall: {losses[0]}, {losses[-1]}"
        state = frozen.body.state_dict()
        assert all(torch.equal(state[name], t) for name, t in body.state_dict().items())
    return 0


if __name__ == "__main__":
    sys.exit(main())
