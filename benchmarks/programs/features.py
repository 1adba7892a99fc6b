"""What works through which bridge: a table of small programs, each compared with ``jax.numpy``.

    python benchmarks/programs/features.py --peers .venv-peers/bin/python --output README.md

Every bridge runs in a process of its own. A cell says what came out: "yes" for the result that the
same function has in ``jax.numpy``, "wrong" for another one, "no" for an exception.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages.page import measured, write_section
from subjects.peers import versions

BRIDGES = ("torch2jax", "wrap_torch2jax", "buffer_callback", "pure_callback")
PEERS = BRIDGES[1:]
ROWS = 64
Fn = Callable[..., Any]

calls: list[int] = []
x = jnp.array([0.1, 0.2, 0.3])
batch = jnp.stack([x * i for i in range(ROWS)])
example = torch.ones(3)


def torch_fn(a: torch.Tensor) -> torch.Tensor:
    calls.append(1)
    return torch.tanh(a).sum()


def twin(a: jax.Array) -> jax.Array:
    return jnp.tanh(a).sum()


# -- the bridges -----------------------------------------------------------------------------------


def bridge(name: str) -> Fn:
    """``wrap(fn, *examples)``: a JAX function."""
    if name in ("torch2jax", "wrap_torch2jax"):
        return importlib.import_module(name).torch2jax
    return {"pure_callback": by_pure_callback, "buffer_callback": by_buffer_callback}[name]


def shapes_of(fn: Fn, examples: Any) -> Any:
    return jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape, t.numpy().dtype), fn(*examples))


def by_pure_callback(fn: Fn, *examples: Any) -> Fn:
    def call(*args: Any) -> Any:
        return jax.tree.map(lambda t: t.numpy(), fn(*(torch.tensor(np.asarray(a)) for a in args)))

    shapes = shapes_of(fn, examples)
    return lambda *args: jax.pure_callback(call, shapes, *args, vmap_method="sequential")


def by_buffer_callback(fn: Fn, *examples: Any) -> Fn:
    from jax.experimental.buffer_callback import buffer_callback

    def call(context: Any, out: Any, *args: Any) -> None:
        results = fn(*(torch.tensor(np.asarray(a)) for a in args))
        for buffer, result in zip(jax.tree.leaves(out), jax.tree.leaves(results), strict=True):
            np.asarray(buffer)[...] = result.numpy()

    return buffer_callback(call, shapes_of(fn, examples), vmap_method="sequential")


# -- the programs ----------------------------------------------------------------------------------


def agrees(transform: Callable[[Fn], Fn], operand: Any = x) -> Callable[[Fn], str]:
    """The function and its twin, each under a transform."""

    def run(wrap: Fn) -> str:
        return verdict(transform(wrap(torch_fn, example))(operand), transform(twin)(operand))

    return run


def verdict(got: Any, expected: Any) -> str:
    return "yes" if jnp.allclose(got, expected, atol=1e-4) else "wrong"


def calls_of(compiled: Fn, operand: Any) -> str:
    """How often PyTorch's function runs, once all is compiled."""
    jax.block_until_ready(compiled(operand))
    calls.clear()
    jax.block_until_ready(compiled(operand))
    return str(len(calls))


def complex_gradient(wrap: Fn) -> str:
    z = jnp.array([1 + 2j])
    f = wrap(lambda z: (z * z).real.sum(), torch.ones(1, dtype=torch.complex64))
    return verdict(jax.grad(f)(z), jax.grad(lambda z: (z * z).real.sum())(z))


def integer_result(wrap: Fn) -> str:
    f = wrap(lambda a: (a.sum(), (a > 0).int()), example)
    return verdict(jax.grad(lambda a: f(a)[0])(x), jnp.ones(3))


def dropout(wrap: Fn) -> str:
    ones = jnp.ones(64)
    f = wrap(lambda a: torch.nn.functional.dropout(a, 0.5), torch.ones(64))
    out, pullback = jax.vjp(f, ones)
    return verdict(pullback(ones)[0], out)


PROGRAMS: dict[str, Callable[[Fn], str]] = {
    "`jit`": agrees(jax.jit),
    "`scan`": agrees(
        lambda f: lambda a: jax.lax.scan(lambda c, _: (c * f(c), None), a, None, length=3)[0]
    ),
    "`grad`": agrees(jax.grad),
    "`jvp`": agrees(lambda f: lambda a: jax.jvp(f, (a,), (a,))[1]),
    "`hessian`": agrees(jax.hessian),
    "third derivative": agrees(lambda f: jax.jacrev(jax.jacrev(jax.grad(f)))),
    "gradient of a complex function": complex_gradient,
    "gradient beside an integer result": integer_result,
    "gradient of a dropout uses its mask": dropout,
    f"`vmap` of {ROWS} rows": agrees(jax.vmap, batch),
    "calls of PyTorch for it": lambda wrap: calls_of(
        jax.jit(jax.vmap(wrap(torch_fn, example))), batch
    ),
    "forward passes for a value and a gradient": lambda wrap: calls_of(
        jax.jit(jax.value_and_grad(wrap(torch_fn, example))), x
    ),
}


def run_all(name: str) -> dict[str, str]:
    wrap, found = bridge(name), {}
    for program, run in PROGRAMS.items():
        try:
            found[program] = run(wrap)
        except Exception as error:
            print(f"{name}, {program}: {type(error).__name__}: {error}"[:200], file=sys.stderr)
            found[program] = "no"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter of the peers' environment")
    parser.add_argument("--bridge", choices=BRIDGES, help="run this one here, and print JSON")
    parser.add_argument("--output", type=Path, metavar="FILE", help="replace the table of FILE")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.bridge:
        print(json.dumps({"cells": run_all(arguments.bridge), "versions": versions()}))
        return

    columns, load, found = {}, os.getloadavg()[0], versions()
    for name in BRIDGES:
        python = (arguments.peers or sys.executable) if name in PEERS else sys.executable
        command = [python, __file__, "--bridge", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        told = json.loads(done.stdout.splitlines()[-1])
        columns[name], found = told["cells"], {**told["versions"], **found}
    lines = [["", *BRIDGES], ["---"] * (len(BRIDGES) + 1)]
    lines += [[program, *(column[program] for column in columns.values())] for program in PROGRAMS]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text = f"{measured(load, found)}\n\n{rows}"
    print(text)
    if arguments.output:
        write_section(arguments.output, text, "features")


if __name__ == "__main__":
    main()
