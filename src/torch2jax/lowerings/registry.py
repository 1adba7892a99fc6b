"""The table of lowerings has PyTorch's operators as functions of arrays.

A lowering takes an operator's arguments, in the order and with the names of its PyTorch signature,
with arrays for tensors. It returns an array, or a tuple or list of arrays. Numbers come as Python
numbers. Where ``scalars`` is True or has the names of arguments, they come as weakly typed 0-d
arrays, so that another value needs no other program. A lowering that draws random numbers
(``random=True``) takes a key in front.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .._errors import Torch2JaxError

__all__ = [
    "TABLE",
    "DataDependentShape",
    "Lowering",
    "ValuesAsked",
    "lowering",
    "lowering_by_name",
    "lowering_of",
    "overload",
]


@dataclass(frozen=True)
class Lowering:
    """A lowering is ``fn`` of arrays, and how it takes its arguments."""

    fn: Callable[..., Any]
    scalars: bool | tuple[str, ...] = False
    random: bool = False
    int32: bool = False
    """Whether an integer result is torch.int32, whatever the inputs' dtypes are."""
    eager: bool = False
    """Whether it reads values: it is never traced, and operands that are tracers are an error."""
    replaced: bool = False
    """Whether it is a user's, who may mean something else than PyTorch by the operator."""


class ValuesAsked(Torch2JaxError):
    """Code asks for values that are being traced; see ``device/tracing/bridged_modules.py``."""

    def __init__(self, what: Any, text: str) -> None:
        super().__init__(text)
        self.what = str(what)
        """What asks."""
        self.line = "?"
        """The line of the user's code that asks."""
        self.calls: list[tuple[int, type]] | None = None
        """Numbers and classes of the modules' calls under way, the innermost first."""


class DataDependentShape(ValuesAsked):
    """The shape of the result of ``what`` depends on values that are being traced."""

    def __init__(self, what: Any) -> None:
        super().__init__(
            what,
            f"the shape of the result of {what} depends on the values of a tensor that is being "
            "traced, and XLA must know shapes when it compiles. Use a result of fixed size "
            "(torch.where with a mask, padding), or run this line outside of the traced function.",
        )


TABLE: dict[Any, Lowering] = {}
_BY_NAME: dict[str, Lowering] = {}
UNKNOWN: list[str] = []
"""Names of lowerings for which the installed PyTorch has no operator."""


_SPACES = {"prims": "torch._prims", "torch_nn": "torch.nn.modules.linear_cross_entropy"}
"""Other namespaces of operators, and the modules that register them."""


def overload(name: str) -> Any:
    """Return the operator called "add.Tensor", "relu" (its default overload) or "prims.sin"."""
    space: Any = torch.ops.aten
    for other, module in _SPACES.items():
        if name.startswith(f"{other}."):
            with contextlib.suppress(ImportError):  # PyTorch may lack it
                importlib.import_module(module)
            space, name = getattr(torch.ops, other), name.removeprefix(f"{other}.")
    packet, _, which = name.partition(".")
    return getattr(getattr(space, packet, None), which or "default", None)


def lowering(
    *names: str,
    scalars: bool | tuple[str, ...] = False,
    random: bool = False,
    int32: bool = False,
    eager: bool = False,
) -> Callable[[Any], Any]:
    """Register a function as the lowering of operators."""

    def register(fn: Any) -> Any:
        for name in names:
            op = overload(name)
            if op is None:
                UNKNOWN.append(name)
            else:
                TABLE[op] = Lowering(fn, scalars, random, int32, eager)
        return fn

    return register


def lowering_by_name(name: str) -> Callable[[Any], Any]:
    """Register a lowering of an operator that a library may bring later, such as "space::op"."""

    def register(fn: Any) -> Any:
        _BY_NAME[name] = Lowering(fn)
        return fn

    return register


def lowering_of(op: Any) -> Lowering | None:
    """Return the lowering of an operator, or None."""
    return TABLE.get(op) or _BY_NAME.get(op.name())
