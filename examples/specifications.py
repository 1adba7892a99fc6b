"""Input and output specifications: what goes in, what comes out, and when to say so.

    python examples/specifications.py                # every way, with what JAX sees
    python examples/specifications.py --smoke        # the same: it takes seconds

Arguments and results of a wrapped function are pytrees. The package finds their structure, shapes
and dtypes when JAX traces, by running the function on fake tensors, so most functions need no
specification at all. This script goes through the cases that do, or may, have one, and checks each
against PyTorch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from torch2jax import SignatureError, Size, torch2jax, tree_j2t

console = Console()


class Fit(NamedTuple):
    """A namedtuple is a pytree."""

    mean: Any
    spread: Any


def summary(data: dict[str, torch.Tensor], weights: list[torch.Tensor]) -> dict[str, Any]:
    x = data["x"] * weights[0] + weights[1]
    return {"fit": Fit(x.mean(0), x.std(0)), "count": x.shape[0], "none": None}


def nothing() -> tuple[str, Callable[..., Any], tuple[Any, ...]]:
    """Without a specification structure, shapes and dtypes are inferred for every new shape."""
    return (
        "inferred",
        torch2jax(summary),
        ({"x": jnp.arange(12.0).reshape(4, 3)}, [jnp.ones(3), jnp.zeros(3)]),
    )


def by_tensors() -> tuple[str, Callable[..., Any], tuple[Any, ...]]:
    """Examples fix the structure of the arguments and the dtypes in which they reach PyTorch."""
    logits, labels = torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)
    fn = torch2jax(torch.nn.functional.cross_entropy, logits, labels)
    return "example tensors", fn, (jnp.ones((7, 3)), jnp.zeros(7, jnp.int32))


def by_structs() -> tuple[str, Callable[..., Any], tuple[Any, ...]]:
    """Nothing has to be allocated: `jax.ShapeDtypeStruct` says the same as a tensor."""
    example = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    return "example structs", torch2jax(torch.linalg.inv, example), (2 * jnp.eye(2),)


def by_result() -> tuple[str, Callable[..., Any], tuple[Any, ...]]:
    """With `output_shapes` the function never runs to infer: it may look at values as it likes."""

    def ranks(x: torch.Tensor) -> dict[str, torch.Tensor]:
        order = sorted(range(len(x)), key=lambda i: x[i].item())
        return {"order": torch.tensor(order, dtype=torch.int32), "least": x[order[0]]}

    shapes = {"order": jax.ShapeDtypeStruct((4,), jnp.int32), "least": Size([])}
    fn = torch2jax(ranks, output_shapes=shapes)
    return "output_shapes", fn, (jnp.array([3.0, 1.0, 2.0, 0.5]),)


def by_keyword() -> tuple[str, Callable[..., Any], tuple[Any, ...]]:
    """Strings, bools and None pass as they are; a number that Python must see is static."""

    def pooled(x: torch.Tensor, size: int, *, mode: str) -> torch.Tensor:
        pool = {"max": torch.nn.functional.max_pool1d, "mean": torch.nn.functional.avg_pool1d}
        return pool[mode](x[None], size)[0]

    fn = torch2jax(pooled, static_argnums=1)
    return "static arguments", lambda x: fn(x, 2, mode="max"), (jnp.arange(8.0).reshape(2, 4),)


CASES = (nothing, by_tensors, by_structs, by_result, by_keyword)


def seen(tree: Any) -> str:
    """Return shapes and dtypes of a tree, on one line."""
    return str(jax.tree.map(lambda x: jax.typeof(x).str_short(short_dtypes=True), tree))


def check(fn: Callable[..., Any], result: Any, operands: tuple[Any, ...]) -> None:
    """Compare with what PyTorch alone makes of the same arguments."""
    original = getattr(fn, "__wrapped__", None)
    if original is None:  # behind a lambda
        return
    tensors = list(tree_j2t(operands))
    if original is torch.nn.functional.cross_entropy:
        tensors[1] = tensors[1].long()
    expected = original(*tensors)
    for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def refused() -> str:
    """A result that is not as declared is an error that says so, when JAX traces or runs."""
    try:
        torch2jax(torch.unique)(jnp.array([1.0, 2.0, 2.0]))
    except SignatureError as error:
        return str(error)
    raise AssertionError("a result without a fixed shape was accepted")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="the same: it takes seconds")
    parser.parse_args(argv)

    table = Table("specification", "arguments", "result", box=None, pad_edge=False)
    for case in CASES:
        name, fn, operands = case()
        result = jax.jit(fn)(*operands)
        check(fn, result, operands)
        table.add_row(f"[bold]{name}[/]", seen(operands), seen(result))
    console.print(table)
    console.print(f"\n[bold]refused[/]  {refused()}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
