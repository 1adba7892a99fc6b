"""Train a PyTorch policy through a differentiable simulator written in jax.numpy.

    python examples/jax_in_pytorch.py                # swing a pendulum upright and hold it
    python examples/jax_in_pytorch.py --smoke        # a few seconds: does everything work?

The simulator, a pendulum on a motor too weak to lift it at once, is a `jax.lax.scan`. The policy
and the optimizer are PyTorch's. `jax2torch(simulate)` compiles one step for the whole batch of
pendulums. Autograd goes through all of the policy's decisions, and JAX keeps the residuals.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import nn

from torch2jax import jax2torch

GRAVITY, TORQUE, DT, SUBSTEPS = 9.8, 6.0, 0.05, 4


def simulate(state: Any, action: Any) -> Any:
    """Return the states (angle from upright, velocity), (batch, 2), after one decision."""

    def substep(state: Any, _: None) -> Any:
        angle, velocity = state[:, 0], state[:, 1]
        velocity = velocity + DT / SUBSTEPS * (GRAVITY * jnp.sin(angle) + TORQUE * action[:, 0])
        return jnp.stack([angle + DT / SUBSTEPS * velocity, velocity], 1), None

    return jax.lax.scan(substep, state, None, length=SUBSTEPS)[0]


step = jax2torch(simulate)


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
        )

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        angle, velocity = state.unbind(1)
        features = torch.stack([angle.sin(), angle.cos(), velocity / 5], 1)
        return torch.tanh(self.net(features))


def rollout(policy: Policy, state: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean cost of an episode, and the last states."""
    cost = torch.zeros(())
    for _ in range(steps):
        action = policy(state)
        state = step(state, action)
        angle, velocity = state.unbind(1)
        cost = cost + ((1 - angle.cos()) + 0.02 * velocity**2 + 0.002 * action[:, 0] ** 2).mean()
    return cost / steps, state


def start(batch: int) -> torch.Tensor:
    """Return pendulums that hang down, nearly at rest."""
    angle = math.pi + 0.3 * torch.randn(batch)
    return torch.stack([angle, 0.3 * torch.randn(batch)], 1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=300, help="steps of Adam (300)")
    parser.add_argument("--steps", type=int, default=60, help="decisions in an episode (60)")
    parser.add_argument("--batch", type=int, default=64, help="pendulums (64)")
    parser.add_argument("--smoke", action="store_true", help="10 updates of 20 steps, and a check")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.updates, arguments.steps = 10, 20

    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    with torch.no_grad():
        first, _ = rollout(policy, start(arguments.batch), arguments.steps)
    begin = time.perf_counter()
    for update in range(arguments.updates):
        optimizer.zero_grad()
        cost, _ = rollout(policy, start(arguments.batch), arguments.steps)
        cost.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if update % max(1, arguments.updates // 10) == 0:
            print(f"update {update:4d}  cost {cost.item():.3f}")
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        last, state = rollout(policy, start(arguments.batch), arguments.steps)
    upright = (state[:, 0].cos() > 0.9).float().mean().item()
    print(
        f"cost {first.item():.3f} -> {last.item():.3f}, {upright:.0%} upright, "
        f"{1e3 * seconds / arguments.updates:.0f} ms an update"
    )
    return 0 if last < first else 1


if __name__ == "__main__":
    sys.exit(main())
