"""What each recipe costs beside the same program in PyTorch alone.

    python benchmarks/programs/recipes.py --output docs/recipes/libraries.md

A recipe's own code is run first, and what it made is then timed beside its twin in PyTorch: one
call of each in turn, many rounds. Tables have medians and the median of the rounds' ratios, which
other work on the machine changes least. `--output` names a page; those beside it are written too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jax
import jax.numpy as jnp
import torch
from pages.page import ROOT, measured, number, table, write_section
from subjects.peers import versions

from torch2jax import from_module, torch2jax

FOLDER = ROOT / "docs" / "recipes"
Subject = Callable[[], Any]
Names = dict[str, Any]
NATIVE = "PyTorch alone"


def names_of(page: str) -> Names:
    """Run the page's code; returns what it defined."""
    text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
    names: Names = {"__name__": "__main__"}
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)  # pages may write files
        try:
            for code in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
                exec(compile(code, page, "exec"), names)
        finally:
            os.chdir(here)
    return names


def done(run: Callable[..., Any], *arguments: Any) -> Subject:
    return lambda: jax.block_until_ready(run(*arguments))


def gradient(value: torch.Tensor, of: Any) -> Any:
    return torch.autograd.grad(value, of)


# -- one function a recipe: {what is measured: {way: a call}} --------------------------------------


def force_field(n: Names) -> dict[str, dict[str, Subject]]:
    module, lowered = n["Energy"](), from_module(n["Energy"](), lower=True)
    start = torch.tensor(n["x"].tolist())

    def forces(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return -gradient(module(x), x)[0]

    def native(dt: float = 0.002) -> torch.Tensor:
        x, v, f = start, torch.zeros_like(start), forces(start)
        for _ in range(200):
            v = v + dt / 2 * f
            x = x + dt * v
            f = forces(x)
            v = v + dt / 2 * f
        return x

    call = done(n["dynamics"], n["x"], jnp.zeros_like(n["x"]))
    other = dict(n)
    apply, variables = lowered
    other["forces"] = lambda x: -jax.grad(lambda x: apply(variables, x))(x)

    @jax.jit
    def dynamics(x: Any, v: Any, dt: float = 0.002) -> Any:
        def step(state: Any, _: None) -> Any:
            x, v, f = state
            v = v + dt / 2 * f
            x = x + dt * v
            f = other["forces"](x)
            return (x, v + dt / 2 * f, f), None

        return jax.lax.scan(step, (x, v, other["forces"](x)), length=200)[0]

    plain = done(dynamics, n["x"], jnp.zeros_like(n["x"]))
    ways = {NATIVE: native, "`from_module(model)`": call, "`from_module(model, lower=True)`": plain}
    return {"200 steps of dynamics": ways}


def reward_model(n: Names) -> dict[str, dict[str, Subject]]:
    bert, target = n["bert"], torch.tensor(n["target"].tolist())
    vectors = torch.tensor(n["prompt"].tolist(), requires_grad=True)

    def native() -> Any:
        value = -((bert(inputs_embeds=vectors).last_hidden_state.mean(1) - target) ** 2).sum()
        return gradient(value, vectors)

    apply, variables = from_module(bert, lower=True)

    def lowered(prompt: jax.Array) -> jax.Array:
        out = apply(variables, inputs_embeds=prompt)["last_hidden_state"].mean(1)
        return -((out - n["target"]) ** 2).sum()

    def compiled(reward: Callable[..., Any]) -> Subject:
        return done(jax.jit(jax.value_and_grad(reward)), n["prompt"])

    return {
        "a reward and its gradient": {
            NATIVE: native,
            "`from_module(bert)`": compiled(n["reward"]),
            "`from_module(bert, lower=True)`": compiled(lowered),
        }
    }


def simulator(n: Names) -> dict[str, dict[str, Subject]]:
    starts = torch.tensor(n["starts"].tolist())

    def native() -> Any:
        gains = torch.tensor([4.0, 0.0], requires_grad=True)
        state, total = starts, torch.zeros(len(starts))
        for _ in range(60):
            state, reward = n["pendulum"](state, -(state @ gains))
            total = total + reward
        return gradient(total.mean(), gains)

    def episodes(step: Callable[..., Any]) -> Subject:
        def episode(gains: Any, start: Any) -> Any:

            def advance(state: Any, _: Any) -> Any:
                return step(state, -(state @ gains))

            return jax.lax.scan(advance, start, length=60)[1].sum()

        def run(gains: Any) -> Any:
            return jax.vmap(episode, (None, 0))(gains, n["starts"]).mean()

        return done(jax.jit(jax.grad(run)), jnp.array([4.0, 0.0]))

    return {
        "a gradient of 60 steps of 256 pendulums": {
            NATIVE: native,
            "`torch2jax(pendulum)`": episodes(n["step"]),
            "`torch2jax(pendulum, lower=True)`": episodes(torch2jax(n["pendulum"], lower=True)),
        }
    }


def vector_field(n: Names) -> dict[str, dict[str, Subject]]:
    from torchdiffeq import odeint

    net, times = n["net"], torch.tensor(n["times"].tolist())
    start, wanted = torch.tensor([1.0, 0.0]), torch.tensor(n["wanted"].tolist())
    weights = list(net.parameters())

    def native() -> Any:
        solution = odeint(lambda t, y: net(y), start, times, rtol=1e-3, atol=1e-4, method="dopri5")
        return gradient(((solution - wanted) ** 2).mean(), weights)

    bridge = done(jax.jit(jax.value_and_grad(n["loss"])), n["variables"]["params"])
    other = dict(n)
    apply, variables = from_module(net, lower=True)
    source = (FOLDER / "vector_field.md").read_text(encoding="utf-8")
    (solve,) = re.findall(r"^def solve.*?(?=^start)", source, re.M | re.S)
    other["apply"], other["variables"] = apply, variables
    exec(solve, other)

    def loss(params: Any) -> Any:
        return ((other["solve"](params, n["start"]) - n["wanted"]) ** 2).mean()

    return {
        "a value and a gradient of the loss": {
            "PyTorch alone, with torchdiffeq's `dopri5`": native,
            "`from_module(net)`": bridge,
            "`from_module(net, lower=True)`": done(
                jax.jit(jax.value_and_grad(loss)), variables["params"]
            ),
        }
    }


def serving(n: Names) -> dict[str, dict[str, Subject]]:
    model, prompt = n["model"], torch.tensor(n["prompt"].tolist())

    def native() -> Any:
        with torch.no_grad():
            token, caches = model(prompt, n["blank"], torch.tensor(0))
            for place in range(len(prompt), len(prompt) + 12):
                token, caches = model(token[None], caches, torch.tensor(place))
        return token

    def ours() -> Any:
        first, caches = n["fill"](n["variables"], n["prompt"], n["empty"](), jnp.array(0))
        place = jnp.array(len(n["prompt"]))
        return jax.block_until_ready(n["generate"](n["variables"], first, caches, place, 12))

    return {"a prompt and twelve tokens": {NATIVE: native, "`lower=True`, one program": ours}}


def libraries(n: Names) -> dict[str, dict[str, Subject]]:
    rate, start = torch.tensor(0.7, requires_grad=True), torch.tensor([1.0, 2.0])

    def solver() -> Any:
        return gradient(n["decay"](rate, start).sum(), rate)

    bridge = done(jax.jit(jax.grad(lambda r: n["f"](r, n["start"]).sum())), n["rate"])
    fixed = torch2jax(n["decay"], lower=True)
    plain = done(jax.jit(jax.grad(lambda r: fixed(r, n["start"]).sum())), n["rate"])

    likelihood = n["Likelihood"]()
    free = list(likelihood.parameters())

    def process() -> Any:
        return gradient(likelihood(n["inputs"], n["targets"]), free)

    apply, variables = from_module(n["Likelihood"]())

    def fit(params: Any) -> Any:
        return apply({**variables, "params": params}, n["x"], n["y"])

    graph = n["Graph"]()
    nodes, edges = torch.tensor(n["nodes"].tolist()), torch.tensor(n["edges"].tolist())
    weights = list(graph.parameters())

    def layers() -> Any:
        return gradient((graph(nodes, edges) ** 2).sum(), weights)

    return {
        "torchdiffeq: 20 steps of `rk4` and a gradient": {
            NATIVE: solver,
            "`torch2jax(decay)`": bridge,
            "`torch2jax(decay, lower=True)`": plain,
        },
        "GPyTorch: a gradient of the likelihood": {
            NATIVE: process,
            "`from_module(Likelihood())`": done(jax.jit(jax.grad(fit)), variables["params"]),
        },
        "PyTorch Geometric: a gradient of two layers": {
            NATIVE: layers,
            "`from_module(Graph())`": done(
                jax.jit(jax.grad(n["loss"])), from_module(graph)[1]["params"]
            ),
        },
    }


def lightning(n: Names) -> dict[str, dict[str, Subject]]:
    torch_net = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))

    def epochs(net: torch.nn.Module) -> Subject:
        """50 epochs of four steps, as the page's trainer makes them."""

        def run() -> None:
            model = n["Regression"]()
            model.net = net
            trainer = n["lightning"].Trainer(
                max_epochs=50,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(model, n["loader"])

        return run

    flax = {"`jax_module` of the Flax model": epochs(n["model"].net)}
    native = {"a `torch.nn` model of the same layers": epochs(torch_net)}
    return {"200 training steps under Lightning": native | flax}


RECIPES = (force_field, reward_model, simulator, vector_field, serving, libraries, lightning)


def timed(ways: dict[str, Subject], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each way, one call of each in turn; at least three rounds."""
    for run in ways.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in ways}
    started = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - started > seconds:
            break
        for name, run in ways.items():
            before = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - before))
    return times


def rows_of(what: str, times: dict[str, list[float]]) -> list[list[str]]:
    native = next(iter(times.values()))
    rows = [[f"**{what}**", "", ""]] if what else []
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, native, strict=True))
        rows.append([name, number(statistics.median(own)), number(ratio)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [recipe.__name__ for recipe in RECIPES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="RECIPE")
    parser.add_argument("--rounds", type=int, default=51, help="at most so many (51)")
    parser.add_argument("--seconds", type=float, default=10, help="for each table (10)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the pages of its folder")
    arguments = parser.parse_args()
    output = arguments.output and arguments.output.resolve()
    torch.set_num_threads(1)  # the tensors are tiny, and threads that wait for each other are noise
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for recipe in RECIPES:
        if recipe.__name__ not in arguments.only:
            continue
        load = os.getloadavg()[0]
        rows, counts = [], []
        for what, ways in recipe(names_of(recipe.__name__)).items():
            times = timed(ways, arguments.rounds, arguments.seconds)
            counts.append(len(next(iter(times.values()))))
            rows += rows_of(what, times)
        head = ["", "ms", "x PyTorch"]
        text = f"{measured(load, versions())}\n\n{table(head, rows)}"
        print(f"\n== {recipe.__name__}, {min(counts)} rounds or more\n{text}", flush=True)
        if output:
            write_section(output.parent / f"{recipe.__name__}.md", text, "recipes")


if __name__ == "__main__":
    main()
