"""Compiled calls run their recorded graphs in PyTorch, which takes no compiler's time.

Everything before the compiler is what users have: tracing, splitting, derivatives, batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import pytest
import torch

from torch2jax._bridge.compiled.libraries import graph_of
from torch2jax._bridge.handler import extension
from torch2jax._bridge.jax_side import lowering

_numbers = itertools.count()
_entries: list[Any] = []
"""They live as long as the process, as libraries do."""
graphs: list[Any] = []
"""The graphs that ran, in the order in which they were lowered."""


def _lower_recorded(ctx: Any, operands: Sequence[Any], callee: Any) -> Sequence[Any]:
    graph = graph_of(callee, [(tuple(x.shape), x.dtype) for x in ctx.avals_in])
    found = [(tuple(s.shape), str(s.dtype).removeprefix("torch.")) for s in graph.results]
    expected = [(tuple(x.shape), str(x.dtype)) for x in ctx.avals_out]
    assert found == expected, (found, expected)
    graphs.append(graph)

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t.contiguous() for t in graph(*tensors))

    entry = extension.Entry(
        name=f"recorded {next(_numbers)}",
        run=run,
        label=callee.options.label,
        inputs=[str(i) for i in range(len(ctx.avals_in))],
        outputs=[str(i) for i in range(len(ctx.avals_out))],
        default_dtype=callee.options.default_dtype,
    )
    _entries.append(entry)
    return jax.ffi.ffi_lowering(extension.TARGET)(ctx, *operands, name=entry.name)


def install() -> None:
    """Run recorded graphs instead of libraries, in this process."""
    lowering._lower_compiled = _lower_recorded


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run recorded graphs instead of libraries, in one test."""
    monkeypatch.setattr(lowering, "_lower_compiled", _lower_recorded)
    graphs.clear()
