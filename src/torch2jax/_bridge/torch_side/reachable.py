"""What a function can reach: its modules and tensors. Imports torch, never JAX."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch


def reachable_modules(roots: Iterable[Any]) -> list[torch.nn.Module]:
    """Modules that a function can reach: see ``_reachable``."""
    return _reachable(roots)[0]


def reachable_leaves(roots: Iterable[Any]) -> list[torch.Tensor]:
    """Tensors with gradients of their own that a function can reach."""
    modules, tensors = _reachable(roots)
    parameters = [p for m in modules for p in m.parameters(recurse=False)]
    return list({id(t): t for t in (*parameters, *tensors)}.values())


def _reachable(roots: Iterable[Any]) -> tuple[list[torch.nn.Module], list[torch.Tensor]]:
    """Modules and leaf tensors that a function can reach.

    It reaches itself, what it is bound to, a partial's arguments, its closures and the globals that
    its code names; in plain objects and containers, what lies one level down.
    """
    modules: dict[int, torch.nn.Module] = {}
    tensors: list[torch.Tensor] = []
    seen: set[int] = set()

    def visit(x: Any, depth: int) -> None:
        if id(x) in seen or depth > 4:
            return
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            if x.requires_grad and x.is_leaf:
                tensors.append(x)
        elif isinstance(x, torch.nn.Module):
            for m in x.modules():
                modules[id(m)] = m
        elif isinstance(x, types.MethodType):
            visit(x.__self__, depth + 1)
            visit(x.__func__, depth + 1)
        elif isinstance(x, functools.partial):
            for y in (x.func, *x.args, *x.keywords.values()):
                visit(y, depth + 1)
        elif isinstance(x, types.FunctionType):
            for cell in x.__closure__ or ():
                with contextlib.suppress(ValueError):  # an empty cell
                    visit(cell.cell_contents, depth + 1)
            for name in _global_names(x.__code__):
                if name in x.__globals__:
                    visit(x.__globals__[name], depth + 1)
            for y in (*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()):
                visit(y, depth + 1)
            visit(getattr(x, "__wrapped__", None), depth + 1)
        elif isinstance(x, list | tuple | set):
            for y in x:
                if isinstance(y, _FOLLOWED):
                    visit(y, depth + 1)
        elif isinstance(x, dict):
            visit(list(x.values()), depth)
        elif hasattr(x, "__dict__") and not isinstance(x, types.ModuleType | type):
            visit(list(vars(x).values()), depth + 1)

    for root in roots:
        visit(root, 0)
    return list(modules.values()), tensors


_FOLLOWED = (torch.Tensor, torch.nn.Module, types.FunctionType, types.MethodType)


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= _global_names(const)
    return names


@contextlib.contextmanager
def preserved(roots: Iterable[Any]) -> Iterator[None]:
    """Restore attributes and containers of reachable modules, and torch's random state."""
    attributes = [(vars(m), dict(vars(m))) for m in reachable_modules(roots)]
    containers = [
        (c, c.copy())
        for _, copy in attributes
        for c in copy.values()
        if isinstance(c, dict | list | set)
    ]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for live, copy in attributes:
                live.clear()
                live.update(copy)
            for live, copy in containers:
                live.clear()
                live.extend(copy) if isinstance(live, list) else live.update(copy)
