"""The report says what ``lower=True`` makes of each operator, and on which line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from .._bridge.calls.names import label_of
from .._bridge.calls.options import Options
from .._bridge.wrapping import wrapped
from .._html import bar, page, table
from .._plots import bars
from ..device.tracing.events import recorded
from .function import LoweredFunction


@dataclass(frozen=True)
class Report:
    """A report says what became of a function's operators; ``print`` shows it as a table.

    Each field is ``{(operator, line of the user's code): count}``. ``modules`` are those that go
    through the bridge because they ask for values: ``{(path and class, what asks, line): count}``.
    """

    native: dict[tuple[str, str], int]
    decomposed: dict[tuple[str, str], int]
    bridge: dict[tuple[str, str], int]
    modules: dict[tuple[str, str, str], int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for name, found in (
            ("lowered", self.native),
            ("decomposed", self.decomposed),
            ("through the bridge", self.bridge),
        ):
            lines.append(f"{name}: {sum(found.values())}")
            for (op, where), count in sorted(found.items()):
                lines.append(f"  {count:4d}  {op:45s} {where}")
        if self.modules:
            lines.append(f"modules through the bridge: {sum(self.modules.values())}")
            for (name, question, where), count in sorted(self.modules.items()):
                lines.append(f"  {count:4d}  {name}: {question} {where}")
        return "\n".join(lines)

    def plot(self, axes: Any = None, most: int = 20) -> Any:
        """Draw how often each operator is called, by what becomes of it. This needs matplotlib.

        Args:
          axes: matplotlib's axes to draw into; by default those of a new figure.
          most: draws so many operators, those with the most calls.

        Returns:
          The axes.
        """
        kinds = {
            "lowered": self.native,
            "decomposed": self.decomposed,
            "through the bridge": self.bridge,
        }
        rows: dict[str, dict[str, int]] = {}
        for kind, found in kinds.items():
            for (op, _), count in found.items():
                row = rows.setdefault(op, dict.fromkeys(kinds, 0))
                row[kind] += count
        first = sorted(rows, key=lambda op: (-sum(rows[op].values()), op))[:most]
        shown = {op: rows[op] for op in first}
        return bars(shown, "What became of the operators", "calls", axes)

    def _repr_html_(self) -> str:
        kinds = {
            "lowered": self.native,
            "decomposed": self.decomposed,
            "through the bridge": self.bridge,
        }
        counts = {name: sum(found.values()) for name, found in kinds.items()}
        rows: list[list[Any]] = [
            [count, op, name, where]
            for name, found in reversed(kinds.items())  # first what XLA does not see
            for (op, where), count in sorted(found.items())
        ]
        parts = [bar({f"{count} {name}": count for name, count in counts.items()})]
        if self.modules:
            asked = [
                [count, name, question, where]
                for (name, question, where), count in sorted(self.modules.items())
            ]
            parts.append(table(["calls", "module on the bridge", "asks for", "in"], asked))
        parts.append(table(["calls", "operator", "", "in"], rows))
        return page("What became of the operators", *parts)


def lowering_report(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Report what ``torch2jax(fn, lower=True)`` makes of each operator, and on which line of yours.

    Args:
      fn: a PyTorch function or module, or what ``torch2jax(..., lower=True)`` returned, or an
        ``apply`` of ``from_module(..., lower=True)``.
      *args: arrays, ``jax.ShapeDtypeStruct``s or pytrees of them, as ``fn`` takes them.
      **kwargs: the same by keyword, with ``rng=`` where random numbers are drawn.

    Returns:
      A ``Report`` with the operators that have a lowering (``native``), that go through PyTorch's
      decompositions (``decomposed``) and through the bridge (``bridge``): those run on PyTorch's
      kernels. ``modules`` are the modules that go through the bridge as a whole, because they ask
      for values. Nothing is computed.

    >>> import torch, jax.numpy as jnp, torch2jax
    >>> report = torch2jax.lowering_report(lambda x: torch.sin(x) + 1, jnp.ones(3))
    >>> sorted(op for op, line in report.native), report.bridge
    (['aten.add.Tensor', 'aten.sin.default'], {})
    """
    if not hasattr(fn, "untraced"):
        options = Options(stochastic="rng" in kwargs)
        fn = wrapped(LoweredFunction, fn, label_of(fn), options)
    leaves, treedef = jax.tree.flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if hasattr(x, "shape")]

    def call(*arrays: Any) -> Any:
        full = list(leaves)  # numbers, flags and strings stay as they are in a call
        for i, x in zip(places, arrays, strict=True):
            full[i] = x
        a, k = treedef.unflatten(full)
        # The function is new each time, because a cached trace would run nothing.
        return fn.untraced()(*a, **k)

    with recorded() as events:
        jax.eval_shape(call, *[leaves[i] for i in places])
    groups: dict[str, dict[tuple[str, str], int]] = {"native": {}, "decomposed": {}, "bridge": {}}
    for (op, route, where), count in events.counts.items():
        groups[route][op, where] = count
    return Report(groups["native"], groups["decomposed"], groups["bridge"], events.modules)
