"""A physics-informed network: PyTorch's layers, JAX's derivatives and optimizer.

    python examples/physics_informed.py              # solve, compare with the exact solution, draw
    python examples/physics_informed.py --smoke      # a few steps: does everything work?

A network u(t, x) is to solve the heat equation u_t = u_xx / 20 on a rod. The ends of the rod are
kept at zero, and its warmth at the start is a sum of two sines. The network learns from the
equation alone: the loss is what u_t - u_xx / 20 is at random points, beside the conditions at the
start and at the ends.

The network is a `torch.nn.Module`. Its derivatives by t and x are `jax.grad` and `jax.grad` of
`jax.grad`, batched by `jax.vmap`. Their gradients by the weights are `jax.grad` once more, a third
derivative through PyTorch. The exact solution is known, and the picture shows both.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from torch2jax import from_module

matplotlib.use("Agg")  # draws to a file: no window, no display needed
import matplotlib.pyplot as plt

RATE = 0.05
Params = dict[str, jax.Array]
console = Console()


def exact(t: Any, x: Any) -> Any:
    """Return the exact solution, in which each sine decays by itself."""
    return sum(
        c * jnp.exp(-RATE * (k * jnp.pi) ** 2 * t) * jnp.sin(k * jnp.pi * x)
        for k, c in ((1, 1.0), (3, 0.5))
    )


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )


class Problem:
    """This class has the loss of a network, and the step that lowers it."""

    def __init__(self, module: nn.Module, optimizer: optax.GradientTransformation) -> None:
        self.apply, variables = from_module(module)
        self.params: Params = variables["params"]
        self.optimizer = optimizer

    def u(self, params: Params, t: jax.Array, x: jax.Array) -> jax.Array:
        """Evaluate the network at one point, from scalars to a scalar. It is zero at both ends."""
        variables = {"params": params, "frozen": {}, "buffers": {}}
        return x * (1 - x) * self.apply(variables, jnp.stack([t, x]))[0]

    def residual(self, params: Params, t: jax.Array, x: jax.Array) -> jax.Array:
        """Return what is left of the equation at one point."""
        u_t = jax.grad(self.u, argnums=1)(params, t, x)
        u_xx = jax.grad(jax.grad(self.u, argnums=2), argnums=2)(params, t, x)
        return u_t - RATE * u_xx

    def loss(self, params: Params, points: jax.Array) -> jax.Array:
        t, x = points.T
        inside = jax.vmap(self.residual, (None, 0, 0))(params, t, x)
        start = jax.vmap(self.u, (None, None, 0))(params, jnp.zeros(()), x) - exact(0.0, x)
        return (inside**2).mean() + 10 * (start**2).mean()

    def step(self, params: Params, state: Any, key: jax.Array, points: int) -> tuple[Any, ...]:
        where = jax.random.uniform(key, (points, 2))
        value, grads = jax.value_and_grad(self.loss)(params, where)
        updates, state = self.optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value


def draw(t: Any, x: Any, found: Any, losses: list[float], path: Path) -> None:
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(12, 3.6), dpi=120, layout="constrained"
    )
    image = left.pcolormesh(t, x, found, cmap="inferno", shading="gouraud")
    figure.colorbar(image, ax=left)
    left.set(xlabel="time", ylabel="place on the rod")
    left.set_title("The network", loc="left", weight="bold", size=10)
    image = middle.pcolormesh(t, x, abs(found - exact(t, x)), cmap="Greys", shading="gouraud")
    figure.colorbar(image, ax=middle)
    middle.set(xlabel="time")
    middle.set_title("Its distance from the exact solution", loc="left", weight="bold", size=10)
    right.semilogy(losses, color="#2563eb", linewidth=0.8)
    right.set(xlabel="step of Adam")
    right.set_title("Loss", loc="left", weight="bold", size=10)
    right.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help="of Adam (default 1500)")
    parser.add_argument("--points", type=int, default=256, help="in a step (default 256)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and points (default 0)")
    parser.add_argument(
        "--output", type=Path, default=Path("physics_informed.png"), help="where the picture goes"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps, and a check")
    arguments = parser.parse_args(argv)
    steps = 60 if arguments.smoke else arguments.steps

    torch.manual_seed(arguments.seed)
    schedule = optax.cosine_decay_schedule(1e-2, max(steps, 1000))
    problem = Problem(network(), optax.adam(schedule))
    params, state = problem.params, problem.optimizer.init(problem.params)
    step = jax.jit(problem.step, static_argnums=3, donate_argnums=(0, 1))

    keys = jax.random.split(jax.random.key(arguments.seed), steps)
    losses, started = [], time.perf_counter()
    for i in track(range(steps), "Adam", console=console):
        params, state, value = step(params, state, keys[i], arguments.points)
        losses.append(float(value))
        if i == 0:
            started = time.perf_counter()  # the first one compiles
    each = (time.perf_counter() - started) / max(steps - 1, 1)

    t, x = jnp.meshgrid(jnp.linspace(0, 1, 61), jnp.linspace(0, 1, 61))
    found = jax.vmap(problem.u, (None, 0, 0))(params, t.ravel(), x.ravel()).reshape(t.shape)
    error = float(jnp.sqrt(((found - exact(t, x)) ** 2).mean()))
    console.print(
        f"{steps} steps of {1e3 * each:.1f} ms: loss {losses[0]:.3f} to {losses[-1]:.2e}; "
        f"[bold green]{error:.1e}[/] from the exact solution (root mean square)",
        highlight=False,
    )
    draw(*map(np.asarray, (t, x, found)), losses, arguments.output)
    console.print(f"Solution, error and loss: [bold]{arguments.output}[/]", highlight=False)
    assert losses[-1] < 0.5 * losses[0], "the loss did not fall"
    return 0


if __name__ == "__main__":
    sys.exit(main())
