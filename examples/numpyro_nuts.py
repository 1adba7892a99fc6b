"""A log-density written in PyTorch, sampled by numpyro's NUTS: Bayesian regression.

    python examples/numpyro_nuts.py                  # sample, compare with pure JAX, draw
    python examples/numpyro_nuts.py --smoke          # a short run: does everything work?

NUTS asks much of a function. It differentiates the function, and runs the gradient inside a
`while_loop` (the tree of leapfrog steps) inside a `scan` (the draws), batched by `vmap` (the
chains), all in one `jit`. `torch2jax(log_density)` passes as any JAX function does. The same
density, written in JAX, is the twin: both posteriors must agree within their Monte Carlo error.

The data are scikit-learn's 442 diabetes patients: ten measurements, and the progress of the
disease a year later. Student-t errors make the regression robust. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.stats as stats
import matplotlib
import numpy as np
import torch
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_diabetes

from torch2jax import torch2jax

matplotlib.use("Agg")  # draws to a file: no window, no display needed
import matplotlib.pyplot as plt

# PyTorch checks a distribution's arguments by their values, which cannot be batched by vmap.
torch.distributions.Distribution.set_default_validate_args(False)

CHAINS = 2
FREEDOM = 5.0  # degrees of freedom of the errors
Parameters = dict[str, jax.Array]  # "slopes", float32[10], and "log_sigma", float32[]
console = Console()


def load() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return standardised measurements, float32[442, 10], progress, float32[442], and names."""
    data = load_diabetes()
    x, y = ((a - a.mean(0)) / a.std(0) for a in (data.data, data.target))
    return x.astype(np.float32), y.astype(np.float32), data.feature_names


# -- the log-density, twice ------------------------------------------------------------------------


def torch_log_density(
    parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    slopes, log_sigma = parameters["slopes"], parameters["log_sigma"]
    prior = torch.distributions.Normal(0.0, 1.0)
    errors = torch.distributions.StudentT(FREEDOM, x @ slopes, log_sigma.exp())
    return prior.log_prob(slopes).sum() + prior.log_prob(log_sigma) + errors.log_prob(y).sum()


def jax_log_density(parameters: Parameters, x: jax.Array, y: jax.Array) -> jax.Array:
    slopes, log_sigma = parameters["slopes"], parameters["log_sigma"]
    prior = stats.norm.logpdf(slopes).sum() + stats.norm.logpdf(log_sigma)
    return prior + stats.t.logpdf(y, FREEDOM, x @ slopes, jnp.exp(log_sigma)).sum()


# -- sampling --------------------------------------------------------------------------------------


class Posterior(NamedTuple):
    """Draws are float64[chains, draws, 11]: ten slopes and log sigma."""

    draws: np.ndarray
    seconds: float

    @property
    def mean(self) -> np.ndarray:
        return self.draws.mean((0, 1))

    @property
    def sd(self) -> np.ndarray:
        return self.draws.std((0, 1))

    @property
    def error(self) -> np.ndarray:
        """This is the Monte Carlo standard error of the means."""
        return self.sd / np.sqrt(effective_sample_size(self.draws))


def sample(log_density: Callable[[Parameters], jax.Array], draws: int, seed: int) -> Posterior:
    """Run NUTS. numpyro minimises a potential, which is the negative log-density."""
    mcmc = MCMC(
        NUTS(potential_fn=lambda parameters: -log_density(parameters), dense_mass=True),
        num_warmup=draws // 2,
        num_samples=draws,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    start = {"slopes": jnp.zeros((CHAINS, 10)), "log_sigma": jnp.zeros(CHAINS)}
    started = time.perf_counter()
    mcmc.run(jax.random.key(seed), init_params=start)
    found = jax.device_get(mcmc.get_samples(group_by_chain=True))
    columns = np.concatenate([found["slopes"], found["log_sigma"][..., None]], axis=-1)
    return Posterior(columns.astype(np.float64), time.perf_counter() - started)


# -- what comes out --------------------------------------------------------------------------------


def report(names: list[str], ours: Posterior, twin: Posterior) -> float:
    """Print both posteriors, and return the largest difference of means in standard errors."""
    apart = np.abs(ours.mean - twin.mean) / np.hypot(ours.error, twin.error)
    rhat = split_gelman_rubin(ours.draws)
    table = Table(title="Posterior mean and sd", title_justify="left", title_style="bold")
    for column in ("", "PyTorch density", "JAX density", "apart, std errors", "split R-hat"):
        table.add_column(column, justify="right" if column else "left")
    for i, name in enumerate([*names, "log sigma"]):
        table.add_row(
            name,
            *(f"{p.mean[i]:+.3f} ± {p.sd[i]:.3f}" for p in (ours, twin)),
            f"{apart[i]:.1f}",
            f"{rhat[i]:.3f}",
        )
    table.add_row(
        "seconds, compiled anew", f"{ours.seconds:.1f}", f"{twin.seconds:.1f}", end_section=True
    )
    console.print(table)
    return float(apart.max())


def draw(names: list[str], ours: Posterior, twin: Posterior, path: Path) -> None:
    """Draw every slope with its central 90 %, by both densities."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    for posterior, label, colour, shift in (
        (ours, "density in PyTorch", "#2563eb", -0.13),
        (twin, "density in JAX", "#f97316", 0.13),
    ):
        slopes = posterior.draws.reshape(-1, 11)[:, :10]
        low, middle, high = np.quantile(slopes, [0.05, 0.5, 0.95], axis=0)
        spread = np.stack([middle - low, high - middle])
        axes.errorbar(
            middle, np.arange(10) + shift, xerr=spread, fmt="o", ms=4, color=colour, label=label
        )
    axes.axvline(0, color="#9ca3af", linewidth=0.8)
    axes.set_yticks(range(10), names)
    axes.invert_yaxis()
    axes.set_xlabel("standardised slope: median and central 90 %")
    axes.set_title("Diabetes progression: NUTS on a PyTorch density", loc="left", weight="bold")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000, help="of each chain (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the chains (default 0)")
    parser.add_argument(
        "--output", type=Path, default=Path("numpyro_nuts.png"), help="where the picture goes"
    )
    parser.add_argument("--smoke", action="store_true", help="150 draws, and a check")
    arguments = parser.parse_args(argv)
    draws = 150 if arguments.smoke else arguments.draws

    *data, names = load()
    x, y = map(jnp.asarray, data)
    density = torch2jax(torch_log_density)
    with console.status("NUTS on the PyTorch density"):
        ours = sample(lambda parameters: density(parameters, x, y), draws, arguments.seed)
    with console.status("NUTS on the JAX density"):
        twin = sample(lambda parameters: jax_log_density(parameters, x, y), draws, arguments.seed)

    apart = report(names, ours, twin)
    draw(names, ours, twin, arguments.output)
    console.print(f"Both posteriors: [bold]{arguments.output}[/bold]", highlight=False)
    if apart > 5:
        console.print(f"[bold red]The posteriors are {apart:.1f} standard errors apart.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
