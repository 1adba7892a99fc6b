"""What a function can reach is found here. This file imports torch, never JAX."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterable
from typing import Any

import torch


def reachable_leaves(roots: Iterable[Any]) -> list[torch.Tensor]:
    """Return the tensors with gradients of their own that a function can reach."""
    reached = Reached(roots)
    parameters = [p for m in reached.modules for p in m.parameters(recurse=False)]
    return list({id(t): t for t in (*parameters, *reached.leaves)}.values())


class Reached:
    """A ``Reached`` holds what a function can reach.

    A function reaches itself, what it is bound to, a partial's arguments, its closures and the
    globals that its code names. Of plain objects and containers it reaches what lies one level
    down.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self._modules: dict[int, torch.nn.Module] = {}
        self.leaves: list[torch.Tensor] = []
        self.objects: list[Any] = []
        self.containers: list[Any] = []
        self.cells: list[types.CellType] = []
        self.globals: list[tuple[dict[str, Any], set[str]]] = []
        self._seen: set[int] = set()
        for root in roots:
            self._visit(root, 0)

    @property
    def modules(self) -> list[torch.nn.Module]:
        return list(self._modules.values())

    def _visit(self, x: Any, depth: int) -> None:
        if id(x) in self._seen or depth > 4:
            return
        self._seen.add(id(x))
        if isinstance(x, torch.Tensor):
            if x.requires_grad and x.is_leaf:
                self.leaves.append(x)
        elif isinstance(x, torch.nn.Module):
            for m in x.modules():
                self._modules[id(m)] = m
        elif isinstance(x, types.MethodType):
            self._visit(x.__self__, depth + 1)
            self._visit(x.__func__, depth + 1)
        elif isinstance(x, functools.partial):
            for y in (x.func, *x.args, *x.keywords.values()):
                self._visit(y, depth + 1)
        elif isinstance(x, types.FunctionType):
            self._visit_function(x, depth)
        elif isinstance(x, list | tuple | set | dict):
            if not isinstance(x, tuple):
                self.containers.append(x)
            self._visit_items(x.values() if isinstance(x, dict) else x, depth)
        elif hasattr(x, "__dict__") and not isinstance(x, types.ModuleType | type):
            self.objects.append(x)
            self._visit_items(vars(x).values(), depth + 1)

    def _visit_items(self, items: Iterable[Any], depth: int) -> None:
        for y in list(items):
            if isinstance(y, _FOLLOWED):
                self._visit(y, depth + 1)

    def _visit_function(self, x: types.FunctionType, depth: int) -> None:
        for cell in x.__closure__ or ():
            with contextlib.suppress(ValueError):  # the cell may be empty
                self._visit(cell.cell_contents, depth + 1)
                self.cells.append(cell)
        names = _global_names(x.__code__) & x.__globals__.keys()
        self.globals.append((x.__globals__, names))
        for name in names:
            self._visit(x.__globals__[name], depth + 1)
        for y in (*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()):
            self._visit(y, depth + 1)
        self._visit(getattr(x, "__wrapped__", None), depth + 1)


_FOLLOWED = (torch.Tensor, torch.nn.Module, types.FunctionType, types.MethodType)


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= _global_names(const)
    return names
