"""Train a PyTorch network with JAX: a CNN on handwritten digits, optax, `jax.jit`.

    python examples/train_digits.py                  # train, compare with native PyTorch, draw
    python examples/train_digits.py --smoke          # a few seconds: does everything work?
    python examples/train_digits.py --distributed 2  # on two processes of this machine

On several machines, start it on each with `--coordinator host:port --processes N --process I`. See
docs/devices.md.

The network is an ordinary `torch.nn.Module`. One line makes it a JAX function of its weights:

    apply, variables = from_module(model)

From there on everything is JAX: the weights are a pytree of JAX arrays, the loss and the optimizer
come from optax, the gradient is `jax.value_and_grad`, and the step is one compiled program.

The data are scikit-learn's 1,797 scans of handwritten digits, 8 x 8 pixels each. Nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import copy
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import torch
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from torch2jax import from_module

matplotlib.use("Agg")  # draws to a file: no window, no display needed
import matplotlib.pyplot as plt

LEARNING_RATE = 3e-3
BATCH = 64

Params = dict[str, jax.Array]
console = Console()


# -- the data --------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Images are float32[n, 1, 8, 8] in [0, 1], labels int32[n]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(seed: int) -> Digits:
    """Return scikit-learn's digits, one fifth of them held out for testing."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    labels = labels.astype(np.int32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    return Digits(train_images, train_labels, test_images, test_labels)


def batches(data: Digits, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield one epoch in random order. All batches have one size, so the step compiles once."""
    order = rng.permutation(len(data.train_labels))
    for start in range(0, len(order) - BATCH + 1, BATCH):
        rows = order[start : start + BATCH]
        yield data.train_images[rows], data.train_labels[rows]


# -- the network: PyTorch --------------------------------------------------------------------------


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, 10),
    )


# -- the training step: JAX ------------------------------------------------------------------------


class Trainer:
    """The network as a JAX function, with its weights and the optimizer's state as pytrees.

    On a mesh every device has all weights and its share of each batch. The specs say so. From them
    it follows that the gradients are summed over the devices.
    """

    def __init__(self, model: nn.Module, mesh: Mesh | None = None) -> None:
        self.mesh = mesh
        whole, variables = from_module(model)
        apply = whole
        if mesh is not None:
            apply, _ = from_module(
                model, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P("batch")
            )
            host = jax.tree.map(np.asarray, variables)
            variables = jax.device_put(host, NamedSharding(mesh, P()))
        optimizer = optax.adam(LEARNING_RATE)

        def loss_fn(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
            logits = apply({**variables, "params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        @jax.jit
        def step(
            params: Params, state: optax.OptState, images: jax.Array, labels: jax.Array
        ) -> tuple[Params, optax.OptState, jax.Array]:
            loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, loss

        @jax.jit
        def probabilities(params: Params, images: jax.Array) -> jax.Array:
            return jax.nn.softmax(whole({"frozen": {}, "buffers": {}, "params": params}, images))

        # Copies of the module's weights, by the names of its state_dict. The module itself is not
        # touched again; torch2jax.to_state_dict is the way back.
        self.params: Params = variables["params"]
        self.state = jax.jit(optimizer.init)(self.params)
        self._step = step
        self._probabilities = probabilities

    def step(self, images: np.ndarray, labels: np.ndarray) -> jax.Array:
        """Take one step of Adam on one batch, and return the loss before it."""
        if self.mesh is not None:
            images, labels = self.shared(images, labels)
        self.params, self.state, loss = self._step(self.params, self.state, images, labels)
        return loss

    def shared(self, *batch: np.ndarray) -> list[jax.Array]:
        """Split a batch over the mesh. Every process has all of it, and feeds its own devices."""
        assert self.mesh is not None
        sharding = NamedSharding(self.mesh, P("batch"))
        return [jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in batch]

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return class probabilities, [n, 10]."""
        # On one device: each process has all weights.
        params = jax.tree.map(np.asarray, self.params)
        return np.asarray(self._probabilities(params, images))

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        return float(np.mean(self.probabilities(images).argmax(axis=1) == labels))


class History(NamedTuple):
    losses: list[float]  # one for each step
    accuracies: list[float]  # on the test images, one for each epoch
    seconds: float


def train(trainer: Trainer, data: Digits, epochs: int, seed: int) -> History:
    """Train for some epochs behind a progress bar."""
    rng = np.random.default_rng(seed)
    losses: list[float] = []
    accuracies: list[float] = []
    progress = Progress(
        TextColumn("[bold]training"),
        BarColumn(bar_width=20),
        TextColumn("epoch {task.completed:>2.0f}/{task.total:.0f}"),
        TextColumn("loss [cyan]{task.fields[loss]:.4f}"),
        TextColumn("test accuracy [green]{task.fields[accuracy]:.2%}"),
        TimeElapsedColumn(),
        console=console,
    )
    started = time.perf_counter()
    with progress:
        bar = progress.add_task("", total=epochs, loss=float("nan"), accuracy=0.0)
        for _ in range(epochs):
            epoch = [trainer.step(images, labels) for images, labels in batches(data, rng)]
            losses += [float(loss) for loss in epoch]
            accuracies.append(trainer.accuracy(data.test_images, data.test_labels))
            mean = float(np.mean(losses[-len(epoch) :]))
            progress.update(bar, advance=1, loss=mean, accuracy=accuracies[-1])
    return History(losses, accuracies, time.perf_counter() - started)


# -- the same loop in native PyTorch ---------------------------------------------------------------


def make_native_step(model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Make the step as a user of PyTorch alone writes it, with torch's fastest Adam."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(images: torch.Tensor, labels: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def compare(trainer: Trainer, model: nn.Module, data: Digits, rounds: int) -> tuple[float, float]:
    """Return the median milliseconds for a step of this loop, and of native PyTorch.

    The two loops take turns on the same batches, so that whatever else the machine does meets
    both, and each step ends with its loss as a Python number, so that nothing is left running.
    """
    numpy_batches = list(batches(data, np.random.default_rng(0)))
    jax_batches = [(jnp.asarray(x), jnp.asarray(y)) for x, y in numpy_batches]
    torch_batches = [(torch.from_numpy(x), torch.from_numpy(y).long()) for x, y in numpy_batches]
    native_step = make_native_step(model)
    runs: list[tuple[Callable[..., Any], list[tuple[Any, Any]]]] = [
        (trainer.step, jax_batches),
        (native_step, torch_batches),
    ]
    times: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for (step, data_batches), taken in zip(runs, times, strict=True):
            for images, labels in data_batches:
                started = time.perf_counter()
                float(step(images, labels))
                if number > 0:  # the first round warms up
                    taken.append(1e3 * (time.perf_counter() - started))
    ours, native = (statistics.median(taken) for taken in times)
    return ours, native


# -- what comes out --------------------------------------------------------------------------------


def draw(history: History, trainer: Trainer, data: Digits, path: Path) -> None:
    """Draw the learning curve, and below it two rows of test digits, the least certain first."""
    probabilities = trainer.probabilities(data.test_images)
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities[np.arange(len(predicted)), data.test_labels]
    shown = np.concatenate([np.argsort(confidence)[:10], np.arange(10)])

    blue, green, red, grey = "#2563eb", "#15803d", "#dc2626", "#6b7280"
    figure = plt.figure(figsize=(9, 7), dpi=120, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.35, 1])

    axes = upper.subplots()
    steps_per_epoch = len(history.losses) // len(history.accuracies)
    epochs = np.arange(1, len(history.accuracies) + 1)
    axes.plot(
        (np.arange(len(history.losses)) + 1) / steps_per_epoch,
        history.losses,
        color=blue,
        linewidth=0.8,
    )
    axes.set(xlabel="epoch", xlim=(0, epochs[-1]), yscale="log")
    axes.set_ylabel("training loss", color=blue)
    axes.set_title(
        "A PyTorch CNN, trained by JAX and optax on handwritten digits", loc="left", weight="bold"
    )
    twin = axes.twinx()
    twin.plot(epochs, [100 * a for a in history.accuracies], color=green, linewidth=1.8)
    twin.set_ylabel("test accuracy, %", color=green)
    twin.annotate(
        f"{history.accuracies[-1]:.2%}",
        (epochs[-1], 100 * history.accuracies[-1]),
        xytext=(-6, -16),
        textcoords="offset points",
        color=green,
        ha="right",
        weight="bold",
    )
    for plot in (axes, twin):
        plot.spines["top"].set_visible(False)

    lower.suptitle(
        "Test digits: the ten least certain, then ten others", x=0.02, ha="left", weight="bold"
    )
    for row, cell in zip(shown, lower.subplots(2, 10).flat, strict=True):
        right = predicted[row] == data.test_labels[row]
        cell.imshow(data.test_images[row, 0], cmap="gray_r")
        cell.set_xticks([])
        cell.set_yticks([])
        cell.spines[:].set_color(grey if right else red)
        title = f"{predicted[row]}" if right else f"{predicted[row]}, is {data.test_labels[row]}"
        cell.set_title(title, color=grey if right else red, fontsize=11)
        cell.set_xlabel(f"{probabilities[row].max():.0%}", color=grey, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def report(ours: float, native: float) -> None:
    table = Table(title="One training step, median", title_justify="left", title_style="bold")
    table.add_column("loop")
    table.add_column("ms", justify="right")
    table.add_column("relative", justify="right")
    table.add_row("torch2jax: jax.jit, optax.adam", f"{ours:.2f}", f"{ours / native:.2f} x")
    table.add_row("native PyTorch: autograd, fused Adam", f"{native:.2f}", "1.00 x")
    console.print(table)


# -- several processes -----------------------------------------------------------------------------


def start_processes(count: int, argv: list[str]) -> int:
    """Start this program again, ``count`` times. The first that fails ends all of them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    own = ["--coordinator", f"localhost:{port}", "--processes", str(count)]
    processes = [
        subprocess.Popen([sys.executable, __file__, *argv, *own, "--process", str(i)])
        for i in range(count)
    ]
    failed = 0
    while processes and not failed:
        time.sleep(0.1)
        ended = [p for p in processes if p.poll() is not None]
        failed = next((p.returncode for p in ended if p.returncode), 0)
        processes = [p for p in processes if p not in ended]
    for process in processes:
        process.kill()
    return failed


def train_distributed(arguments: argparse.Namespace, data: Digits, model: nn.Module) -> int:
    """Do one process's part. All processes go through the same program."""
    jax.distributed.initialize(
        arguments.coordinator,
        arguments.processes,
        arguments.process,
        heartbeat_timeout_seconds=arguments.timeout,  # then the others learn that one has died
    )
    console.quiet = arguments.process != 0
    console.print(f"{jax.process_count()} processes, {jax.device_count()} devices")
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    trainer = Trainer(model, mesh)
    history = train(trainer, data, arguments.epochs, arguments.seed)
    console.print(
        f"Test accuracy [bold green]{history.accuracies[-1]:.2%}[/bold green] after "
        f"{len(history.losses)} steps in {history.seconds:.1f} s, final loss "
        f"{history.losses[-1]:.6f}",
        highlight=False,
    )
    return int(history.accuracies[-1] < arguments.require)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=25, help="passes over the data (default 25)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights, the split and the order (default 0)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("train_digits.png"), help="where the picture goes"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="3 epochs, a short comparison, and a check"
    )
    parser.add_argument("--require", type=float, default=0.0, help="fail below this test accuracy")
    parser.add_argument(
        "--distributed", type=int, metavar="N", help="train on N processes of this machine"
    )
    parser.add_argument("--coordinator", help="host:port of process 0, to be one of several")
    parser.add_argument("--processes", type=int, help="their number")
    parser.add_argument("--process", type=int, help="the number of this one, from 0")
    parser.add_argument(
        "--timeout", type=int, default=30, help="seconds until a dead process is noticed"
    )
    arguments = parser.parse_args(argv)
    rounds = 1 if arguments.smoke else 10
    epochs = arguments.epochs = 3 if arguments.smoke else arguments.epochs
    if epochs < 1:
        parser.error("--epochs must be at least 1")
    if arguments.distributed and not arguments.coordinator:
        return start_processes(arguments.distributed, argv)

    torch.manual_seed(arguments.seed)
    data = load(arguments.seed)
    model = make_model()
    if arguments.coordinator:
        return train_distributed(arguments, data, model)
    console.print(
        "[bold]A PyTorch CNN, trained by JAX on handwritten digits[/bold]\n"
        f"{sum(p.numel() for p in model.parameters()):,} weights, "
        f"{len(data.train_labels):,} digits to learn from, {len(data.test_labels)} to test on\n"
        f"torch {torch.__version__}, jax {jax.__version__}",
        highlight=False,
    )

    trainer = Trainer(model)
    history = train(trainer, data, epochs, arguments.seed)
    console.print(
        f"Test accuracy [bold green]{history.accuracies[-1]:.2%}[/bold green] "
        f"after {len(history.losses)} steps in {history.seconds:.1f} s",
        highlight=False,
    )
    draw(history, trainer, data, arguments.output)
    report(*compare(trainer, model, data, rounds))
    console.print(
        f"Learning curve and predictions: [bold]{arguments.output}[/bold]", highlight=False
    )

    if arguments.smoke:
        first, last = np.mean(history.losses[:5]), np.mean(history.losses[-5:])
        assert last < 0.5 * first, (
            f"the loss did not fall: {first:.3f} at first, {last:.3f} at last"
        )
    if history.accuracies[-1] < arguments.require:
        console.print(f"[bold red]Less than the {arguments.require:.0%} asked for.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
