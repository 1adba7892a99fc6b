"""A solver of differential equations, diffrax, as a layer of a PyTorch network.

    python examples/ode_layer.py                # a few minutes
    python examples/ode_layer.py --smoke        # a few seconds: does everything work?

A PyTorch network looks at noisy counts of predators and prey and says which rates rule them. The
layer behind it, `jax2torch(solve)`, integrates the equations of Lotka and Volterra with these
rates, and the loss compares the solution with the counts. Nobody shows the network a true rate: it
learns to read the rates through the solver. The solver chooses its steps by itself, so it is no
chain of PyTorch operators. Its gradients are diffrax's own adjoint.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import torch
from torch import nn

from torch2jax import jax2torch

TIMES = jnp.linspace(0.0, 6.0, 25)
MEAN_RATES = torch.tensor([1.0, 0.6, 0.8, 0.5])
"""The rates are birth of prey, hunting, death of predators, and their growth by hunting."""
NOISE = 0.05


def growth(_: Any, counts: Any, rates: Any) -> Any:
    """Return d/dt of both populations, after Lotka and Volterra."""
    prey, predators = counts
    birth, hunting, death, breeding = rates
    return jnp.stack(
        [birth * prey - hunting * prey * predators, breeding * prey * predators - death * predators]
    )


def solve_one(start: Any, rates: Any) -> Any:
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(growth),
        diffrax.Tsit5(),
        t0=TIMES[0],
        t1=TIMES[-1],
        dt0=0.05,
        y0=start,
        args=rates,
        saveat=diffrax.SaveAt(ts=TIMES),
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-4),
        max_steps=256,
    )
    return solution.ys


def solve(starts: Any, rates: Any) -> Any:
    """Solve from starts (batch, 2) with rates (batch, 4), which gives (batch, times, 2)."""
    return jax.vmap(solve_one)(starts, rates)


class Reader(nn.Module):
    """This network reads rates from counts, and returns the counts that these rates give."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Flatten(), nn.Linear(2 * len(TIMES), 128), nn.SiLU()),
            *(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 4)),
        )
        self.solver = jax2torch(solve)

    def forward(self, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rates = MEAN_RATES * torch.exp(torch.tanh(self.net(counts.log())))
        return self.solver(counts[:, 0], rates), rates


def misfit(curves: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the mean square difference of logarithms, nearly that of relative errors."""
    return (curves.clamp_min(1e-3).log() - counts.log()).square().mean()


def observe(batch: int, solver: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy counts, and the rates behind them."""
    rates = MEAN_RATES * torch.exp(0.3 * torch.randn(batch, 4))
    starts = torch.exp(0.3 * torch.randn(batch, 2))
    with torch.no_grad():
        exact = solver(starts, rates)
    noise = NOISE * torch.randn_like(exact)
    noise[:, 0] = 0  # the layer starts where the counts start
    return exact.clamp_min(1e-3) * noise.exp(), rates


def error(rates: torch.Tensor, true: torch.Tensor) -> float:
    return (rates / true - 1).abs().median().item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=1000, help="steps of Adam (1000)")
    parser.add_argument("--batch", type=int, default=64, help="curves in a batch (64)")
    parser.add_argument("--smoke", action="store_true", help="20 updates of 16 curves, and a check")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.updates, arguments.batch = 20, 16

    torch.manual_seed(0)
    reader = Reader()
    test, true = observe(256, reader.solver)
    optimizer = torch.optim.Adam(reader.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.updates)

    def assess() -> tuple[float, float]:
        with torch.no_grad():
            curves, rates = reader(test)
        return misfit(curves, test).sqrt().item(), error(rates, true)

    before, mistake = assess()
    begin = time.perf_counter()
    for update in range(arguments.updates):
        counts, _ = observe(arguments.batch, reader.solver)
        optimizer.zero_grad()
        curves, _ = reader(counts)
        loss = misfit(curves, counts)
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if update % max(1, arguments.updates // 10) == 0:
            print(f"update {update:4d}  misfit {loss.sqrt().item():.3f}")
    seconds = time.perf_counter() - begin
    after, mistake_after = assess()
    print(
        f"misfit of curves {before:.3f} -> {after:.3f} (noise {NOISE}), error of the rates "
        f"{mistake:.1%} -> {mistake_after:.1%}, {1e3 * seconds / arguments.updates:.0f} ms an "
        "update"
    )
    return 0 if after < before and mistake_after < mistake else 1


if __name__ == "__main__":
    sys.exit(main())
