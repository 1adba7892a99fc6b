"""A ResNet as a feature extractor: PyTorch's blocks, read out at every stage by JAX.

    python examples/resnet_features.py               # train, read out, draw
    python examples/resnet_features.py --smoke       # a few seconds: does everything work?

A small residual network learns in plain PyTorch without a single label. It sees scans of digits
that are turned by 0, 90, 180 or 270 degrees, and has to say by how much. Then it is frozen.
Forward hooks give the features after each stage, as many people take them. The whole is one JAX
function from images to a dict of features.

JAX does the rest. How much do the features know of digits? The script fits a linear read-out, ridge
regression in `jax.numpy`, from few labelled scans: for each stage, for the pixels, and for the same
network untrained. `jax.vmap` over many strengths chooses one. And where did the network look? The
gradient of a digit's score by the pixels goes through the read-out, in JAX, and the ResNet, in
PyTorch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

from torch2jax import from_module

matplotlib.use("Agg")  # draws to a file: no window, no display needed
import matplotlib.pyplot as plt

STAGES = ("stem", "stage1", "stage2", "stage3")
Features = dict[str, jax.Array]
console = Console()


# -- PyTorch: the network --------------------------------------------------------------------------


class Block(nn.Module):
    """This block has two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.around = nn.Identity()
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.around = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(out)) + self.around(x)).relu()


class ResNet(nn.Module):
    def __init__(self, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        first = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU())
        self.stage1 = nn.Sequential(Block(width, width), Block(width, width))
        self.stage2 = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width))
        self.stage3 = nn.Sequential(Block(2 * width, 4 * width, 2), Block(4 * width, 4 * width))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in STAGES:
            x = getattr(self, stage)(x)
        return self.head(x.mean((2, 3)))


class Extractor(nn.Module):
    """Forward hooks catch a network's features after every stage."""

    def __init__(self, body: ResNet) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        caught: dict[str, torch.Tensor] = {}

        def catch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: object, out: torch.Tensor) -> None:
                caught[name] = nn.functional.adaptive_avg_pool2d(out, 2).flatten(1)

            return hook

        handles = [getattr(self.body, s).register_forward_hook(catch(s)) for s in STAGES]
        self.body(x)
        for handle in handles:
            handle.remove()
        return caught


def learn_turns(images: np.ndarray, epochs: int) -> ResNet:
    """Train on the images alone: by how much is each turned?"""
    model = ResNet().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    x = torch.from_numpy(images)
    for _ in track(range(epochs), "PyTorch learns turns, without labels", console=console):
        for rows in torch.randperm(len(x)).split(128):
            turns = torch.arange(len(rows)) % 4
            turned = torch.empty_like(x[rows])
            for k in range(4):
                turned[turns == k] = x[rows[turns == k]].rot90(k, (2, 3))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(turned), turns).backward()
            optimizer.step()
    return model


# -- JAX: the read-out -----------------------------------------------------------------------------


class Readout(NamedTuple):
    mean: jax.Array
    scale: jax.Array
    weights: jax.Array

    def __call__(self, features: jax.Array) -> jax.Array:
        z = (features - self.mean) / self.scale
        return jnp.concatenate([z, jnp.ones((*z.shape[:-1], 1))], -1) @ self.weights


def fit(features: jax.Array, labels: jax.Array, strength: jax.Array) -> Readout:
    """Fit a ridge regression onto the ten digits."""
    mean, scale = features.mean(0), features.std(0) + 1e-3
    z = jnp.concatenate([(features - mean) / scale, jnp.ones((len(features), 1))], 1)
    square = z.T @ z + strength * jnp.eye(z.shape[1])
    weights = jnp.linalg.solve(square, z.T @ jax.nn.one_hot(labels, 10))
    return Readout(mean, scale, weights)


@jax.jit
def best(features: jax.Array, labels: jax.Array) -> Readout:
    """Return the read-out of the strength that does best on the quarter that is held out."""
    split = 3 * len(features) // 4

    def score(strength: jax.Array) -> jax.Array:
        readout = fit(features[:split], labels[:split], strength)
        return (readout(features[split:]).argmax(-1) == labels[split:]).mean()

    strengths = jnp.logspace(0, 4, 9)
    return fit(features, labels, strengths[jax.vmap(score)(strengths).argmax()])


def draw(scores: dict[str, list[float]], image: np.ndarray, maps: np.ndarray, path: Path) -> None:
    figure = plt.figure(figsize=(10, 3.8), dpi=120, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    axes = left.subplots()
    for (name, values), colour in zip(scores.items(), ("#2563eb", "#9ca3af"), strict=True):
        axes.plot(("pixels", *STAGES), [100 * v for v in values], "o-", color=colour, label=name)
    axes.set(ylabel="unseen scans right, %")
    axes.set_title("A linear read-out of each stage", loc="left", weight="bold", size=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    right.suptitle("A scan, and the gradient of its digit's score", weight="bold", size=10)
    for (above, below), scan, gradient in zip(right.subplots(2, 4).T, image, maps, strict=True):
        above.imshow(scan[0], cmap="Greys")
        most = abs(gradient).max() or 1
        below.imshow(gradient[0], cmap="RdBu", vmin=-most, vmax=most)
        above.axis("off")
        below.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--labels", type=int, default=100, help="labelled scans (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default 0)")
    parser.add_argument(
        "--output", type=Path, default=Path("resnet_features.png"), help="where the picture goes"
    )
    parser.add_argument("--smoke", action="store_true", help="one epoch")
    arguments = parser.parse_args(argv)

    torch.manual_seed(arguments.seed)
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(arguments.seed).permutation(len(images))
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)[order]
    labels = labels.astype(np.int32)[order]
    half = len(images) // 2
    trained = learn_turns(images[:half], 1 if arguments.smoke else 12)

    scores = {}
    for name, body in (("trained on turns", trained), ("untrained", ResNet())):
        extractor = Extractor(body).requires_grad_(False).eval()
        apply, variables = from_module(extractor)
        features = jax.jit(lambda x, apply=apply, variables=variables: apply(variables, x))
        seen: Features = {"pixels": jnp.asarray(images.reshape(-1, 64)), **features(images)}
        readouts = {
            stage: best(f[: arguments.labels], labels[: arguments.labels])
            for stage, f in seen.items()
        }
        scores[name] = [
            float((readouts[stage](f[half:]).argmax(-1) == labels[half:]).mean())
            for stage, f in seen.items()
        ]
        if body is trained:
            readout, look = readouts["stage3"], features
            with torch.no_grad():
                want = extractor(torch.from_numpy(images[:8]))
            for stage in STAGES:
                np.testing.assert_allclose(seen[stage][:8], want[stage], atol=1e-4)

    @jax.jit
    def saliency(x: jax.Array, digit: jax.Array) -> jax.Array:
        return jax.grad(lambda x: readout(look(x[None])["stage3"])[0, digit])(x)

    some = images[half : half + 4]
    maps = jax.vmap(saliency)(some, labels[half : half + 4])
    one = saliency(some[1], labels[half + 1])
    np.testing.assert_allclose(maps[1], one, atol=1e-4)

    table = Table("features of", "pixels", *STAGES, box=None, pad_edge=False)
    for name, values in scores.items():
        table.add_row(name, *(f"{v:.1%}" for v in values))
    console.print(
        f"{arguments.labels} labelled scans, {len(images) - half} unseen ones; right are:"
    )
    console.print(table)
    draw(scores, some, np.asarray(maps), arguments.output)
    console.print(f"Read-outs and gradients: [bold]{arguments.output}[/]", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
