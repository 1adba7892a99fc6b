"""A force field in PyTorch, used by JAX: relaxation, vibrations and molecular dynamics.

    python examples/force_field.py                   # relax, vibrate, run, draw
    python examples/force_field.py --smoke           # a few seconds: does everything work?

The energy of a cluster of Lennard-Jones atoms is a PyTorch function, and so are its forces, by
PyTorch's own autograd. Everything that uses them is JAX, and compiled. BFGS finds the minimum.
`jax.jacfwd` of the forces is the Hessian, whose eigenvalues are the squares of the vibrations'
frequencies. A `lax.scan` of velocity Verlet steps moves the atoms.

Thirteen atoms have a known answer: their best arrangement is an icosahedron with an energy of
-44.326801 (Cambridge Cluster Database). The script starts from a shaken icosahedron and must find
this arrangement.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import torch
from jax.scipy.optimize import minimize
from rich.console import Console

from torch2jax import torch2jax

matplotlib.use("Agg")  # draws to a file: no window, no display needed
import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)

ATOMS = 13
BEST = -44.326801
State = tuple[jax.Array, jax.Array, jax.Array]  # positions, velocities, forces
FIRST, SECOND = map(list, zip(*itertools.combinations(range(ATOMS), 2), strict=True))
console = Console()


# -- PyTorch: the force field ----------------------------------------------------------------------


def torch_energy(positions: torch.Tensor) -> torch.Tensor:
    """Return the Lennard-Jones energy of float64[atoms, 3], in units of well depth and radius."""
    r2 = ((positions[FIRST] - positions[SECOND]) ** 2).sum(-1)
    inverse = 1 / r2**3
    return (4 * (inverse**2 - inverse)).sum()


def torch_energy_and_forces(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gradient, energy = torch.func.grad_and_value(torch_energy)(positions)
    return energy, -gradient


energy = torch2jax(torch_energy)
energy_and_forces = torch2jax(torch_energy_and_forces)


# -- JAX: what uses it -----------------------------------------------------------------------------


def jax_energy(positions: jax.Array) -> jax.Array:
    """This twin without PyTorch checks the energy."""
    r2 = ((positions[jnp.array(FIRST)] - positions[jnp.array(SECOND)]) ** 2).sum(-1)
    return (4 * (r2**-6 - r2**-3)).sum()


def icosahedron() -> np.ndarray:
    """Put one atom in the middle and twelve around it."""
    golden = (1 + 5**0.5) / 2
    corners = [(0, a, b * golden) for a in (-1, 1) for b in (-1, 1)]
    shell = [np.roll(corner, turn) for corner in corners for turn in range(3)]
    return np.array([(0, 0, 0), *shell]) * 0.57


@jax.jit
def relax(start: jax.Array) -> jax.Array:
    result = minimize(lambda flat: energy(flat.reshape(-1, 3)), start.ravel(), method="BFGS")
    return result.x.reshape(-1, 3)


@jax.jit
def hessian(positions: jax.Array) -> jax.Array:
    """Return the negative Jacobian of PyTorch's forces, float64[3 atoms, 3 atoms]."""

    def forces(flat: jax.Array) -> jax.Array:
        return energy_and_forces(flat.reshape(-1, 3))[1].ravel()

    return -jax.jacfwd(forces)(positions.ravel())


@jax.jit
def simulate(positions: jax.Array, velocities: jax.Array, times: jax.Array) -> jax.Array:
    """Run velocity Verlet. Return kinetic and potential energy by steps, float64[steps, 2]."""

    def step(state: State, time: jax.Array) -> tuple[State, jax.Array]:
        x, v, f = state
        dt = times[1] - times[0]
        v = v + 0.5 * dt * f
        x = x + dt * v
        potential, f = energy_and_forces(x)
        v = v + 0.5 * dt * f
        return (x, v, f), jnp.stack([0.5 * (v**2).sum(), potential])

    start = (positions, velocities, energy_and_forces(positions)[1])
    return jax.lax.scan(step, start, times)[1]


def draw(frequencies: np.ndarray, times: np.ndarray, energies: np.ndarray, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), dpi=120, layout="constrained")
    left.vlines(frequencies, 0, 1, color="#2563eb", linewidth=2)
    left.set(xlabel="frequency, reduced units", yticks=[], ylim=(0, 1.2))
    left.set_title("Vibrations: eigenvalues of the Hessian", loc="left", weight="bold", size=10)
    kinetic, potential = energies.T
    right.plot(times, kinetic, color="#ee4c2c", label="kinetic")
    right.plot(times, potential - BEST, color="#2563eb", label="potential, above the minimum")
    right.plot(times, kinetic + potential - BEST, color="#111827", label="total")
    right.set(xlabel="time, reduced units", ylabel="energy, reduced units")
    right.set_title("Dynamics: the total energy stays", loc="left", weight="bold", size=10)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the shaking (default 0)")
    parser.add_argument(
        "--output", type=Path, default=Path("force_field.png"), help="where the picture goes"
    )
    parser.add_argument("--smoke", action="store_true", help="a short simulation")
    arguments = parser.parse_args(argv)
    steps = 300 if arguments.smoke else 4000

    rng = np.random.default_rng(arguments.seed)
    start = jnp.asarray(icosahedron() + 0.05 * rng.normal(size=(ATOMS, 3)))
    positions = relax(start)
    found = float(energy(positions))
    console.print(f"Relaxed from {float(energy(start)):.3f} to [bold]{found:.6f}[/]; known: {BEST}")
    assert abs(found - BEST) < 1e-5, "another minimum"

    second = hessian(positions)
    flat_twin = lambda flat: jax_energy(flat.reshape(-1, 3))  # noqa: E731
    np.testing.assert_allclose(second, jax.hessian(flat_twin)(positions.ravel()), atol=1e-6)
    values = np.linalg.eigvalsh(second)
    console.print(
        f"Hessian {second.shape}: {int((abs(values) < 1e-3).sum())} free motions, "
        f"{int((values > 1e-3).sum())} vibrations, the same as without PyTorch"
    )
    assert (abs(values) < 1e-3).sum() == 6, "a free cluster moves and turns in six ways"

    times = np.arange(steps) * 2e-3
    energies = np.asarray(simulate(positions, 0.3 * rng.normal(size=(ATOMS, 3)), times))
    total = energies.sum(1)
    drift = float(np.ptp(total) / energies[:, 0].max())
    console.print(
        f"{steps} steps of dynamics: the total energy moves by {drift:.1e} of the kinetic"
    )
    assert drift < 1e-2

    draw(np.sqrt(values[values > 1e-3]), times, energies, arguments.output)
    console.print(f"Vibrations and energies: [bold]{arguments.output}[/]", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
