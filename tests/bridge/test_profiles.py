"""Profiles show a call under the name of the user's function, forward and backward."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

from torch2jax import from_module, torch2jax

X = jnp.ones((4, 4))


def my_energy(x: torch.Tensor) -> torch.Tensor:
    return (torch.sin(x @ x) ** 2).sum()


class MyLayer(torch.nn.Linear):
    pass


def shown(run: Callable[[], Any], folder: Path) -> set[str]:
    """Return the names of what XLA ran, as a trace of ``jax.profiler`` has them."""
    jax.block_until_ready(run())  # compiled before the trace begins
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(run())
    (path,) = folder.rglob("*.trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    found = {e["args"]["hlo_op"] for e in events if "hlo_op" in e.get("args", {})}
    return {re.sub(r"\.\d+$", "", name) for name in found}


def called(fn: Callable[..., Any], *args: Any) -> list[str]:
    """Return the paths of the calls in the compiled program, in order of the names."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    lines = [line for line in text.splitlines() if 'custom_call_target="torch2jax' in line]
    return sorted(re.findall(r'op_name="([^"]*)"', "\n".join(lines)))


def test_a_trace_has_the_name_forward_and_backward(tmp_path: Path) -> None:
    step = jax.jit(jax.value_and_grad(torch2jax(my_energy)))
    found = shown(lambda: step(X), tmp_path)
    assert {"my_energy", "my_energy_vjp"} <= found


def test_a_module_has_the_name_of_its_class(tmp_path: Path) -> None:
    apply, variables = from_module(MyLayer(4, 2))
    step = jax.jit(jax.grad(lambda v: apply(v, X).sum()))
    found = shown(lambda: step(variables), tmp_path)
    assert {"MyLayer", "MyLayer_vjp"} <= found


@pytest.mark.parametrize(
    ("fn", "names"),
    [
        (torch2jax(my_energy), ["my_energy"]),
        (lambda x: jax.jvp(torch2jax(my_energy), (x,), (x,)), ["my_energy", "my_energy_jvp"]),
        (jax.vmap(torch2jax(my_energy)), ["my_energy_vmap"]),
        (torch2jax(lambda x: x.sin()), ["lambda"]),
        (torch2jax(torch.sin), ["torch_sin"]),
        (torch2jax(my_energy, name="the energy"), ["the_energy"]),
    ],
)
def test_the_last_part_of_a_calls_path(fn: Any, names: list[str]) -> None:
    x = jnp.ones((3, 4, 4)) if names == ["my_energy_vmap"] else X
    paths = called(fn, x)
    assert sorted({path.rpartition("/")[2] for path in paths} & set(names)) == names


def test_scopes_around_a_call_stay() -> None:
    def model(x: Any) -> Any:
        with jax.named_scope("encoder"):
            return torch2jax(my_energy)(x)

    forward, backward = called(jax.value_and_grad(model), X)
    assert re.fullmatch(r".*encoder.*/my_energy", forward)
    assert re.fullmatch(r".*transpose.*encoder.*/my_energy_vjp", backward)
