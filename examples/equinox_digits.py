"""Train a PyTorch network as an Equinox model: BatchNorm, dropout, a checkpoint.

    python examples/equinox_digits.py                # train, save, load, report
    python examples/equinox_digits.py --smoke        # a few seconds: does everything work?

`eqx.nn.make_with_state(TorchModule)(net)` returns a model and the state that BatchNorm keeps, like
any stateful layer of Equinox. The model is a pytree: `eqx.filter_value_and_grad`, optax and
`eqx.tree_serialise_leaves` take it as it is. At the end the trained weights go back to PyTorch.

The data are scikit-learn's scans of handwritten digits, 8 x 8 pixels each. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from torch2jax.equinox import TorchModule, trainable

BATCH = 64
console = Console()


def make_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32 * 4 * 4, 10),
    )


@eqx.filter_value_and_grad(has_aux=True)
def loss_and_grad(part: Any, rest: Any, state: Any, x: Any, y: Any, key: Any) -> Any:
    logits, state = eqx.combine(part, rest)(x, state, key=key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state


@eqx.filter_jit
def accuracy(model: TorchModule, state: eqx.nn.State, x: Any, y: Any) -> jax.Array:
    logits, _ = model(x, state, inference=True)
    return (logits.argmax(axis=1) == y).mean()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15, help="passes over the data (default 15)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default 0)")
    parser.add_argument("--output", type=Path, default=None, help="where the checkpoint goes")
    parser.add_argument("--smoke", action="store_true", help="3 epochs, and a check")
    arguments = parser.parse_args(argv)
    epochs = 3 if arguments.smoke else arguments.epochs

    torch.manual_seed(arguments.seed)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels.astype(np.int32), test_size=0.2, stratify=labels, random_state=0
    )

    net = make_net()
    make = eqx.nn.make_with_state(TorchModule)
    model, state = make(net)
    optimizer = optax.adam(2e-3)
    chosen = trainable(model)  # all arrays but those that PyTorch holds as frozen: here, all
    opt_state = optimizer.init(eqx.filter(model, chosen))

    @eqx.filter_jit
    def step(model: Any, state: Any, opt_state: Any, x: Any, y: Any, key: Any) -> Any:
        part, rest = eqx.partition(model, chosen)
        (loss, state), grads = loss_and_grad(part, rest, state, x, y, key)
        updates, opt_state = optimizer.update(grads, opt_state, part)
        return eqx.apply_updates(model, updates), state, opt_state, loss

    rng, key = np.random.default_rng(arguments.seed), jax.random.key(arguments.seed)
    progress = Progress(
        TextColumn("[bold]training"),
        BarColumn(bar_width=20),
        TextColumn("loss [cyan]{task.fields[loss]:.4f}"),
        TextColumn("test accuracy [green]{task.fields[accuracy]:.2%}"),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        bar = progress.add_task("", total=epochs, loss=float("nan"), accuracy=0.0)
        for _ in range(epochs):
            order = rng.permutation(len(train_y))
            losses = []
            for rows in np.split(order[: len(order) // BATCH * BATCH], len(order) // BATCH):
                key, subkey = jax.random.split(key)
                model, state, opt_state, loss = step(
                    model, state, opt_state, train_x[rows], train_y[rows], subkey
                )
                losses.append(loss)
            right = float(accuracy(model, state, test_x, test_y))
            progress.update(bar, advance=1, loss=float(np.mean(losses)), accuracy=right)

    # A checkpoint, read into a model that was made anew.
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.output or Path(folder, "digits.eqx")
        eqx.tree_serialise_leaves(path, (model, state))
        loaded = eqx.tree_deserialise_leaves(path, make(make_net()))
    assert float(accuracy(*loaded, test_x, test_y)) == right

    # And back to PyTorch.
    trained = copy.deepcopy(net).eval()
    trained.load_state_dict(model.state_dict(state))
    with torch.no_grad():
        native = float(np.mean(trained(torch.from_numpy(test_x)).argmax(1).numpy() == test_y))
    console.print(
        f"Test accuracy [bold green]{right:.2%}[/bold green] in Equinox, "
        f"{float(accuracy(*loaded, test_x, test_y)):.2%} from the checkpoint, "
        f"{native:.2%} with the weights back in PyTorch",
        highlight=False,
    )
    if arguments.smoke:
        assert right > 0.9
        assert abs(native - right) < 0.005
    return 0


if __name__ == "__main__":
    sys.exit(main())
