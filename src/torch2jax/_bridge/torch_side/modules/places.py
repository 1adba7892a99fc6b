"""A module refers to its parameters and buffers in other places than its tables of them.

These are plain lists, dicts, tuples and attributes, its own or of objects that it holds, and the
attributes of TorchScript's modules. This file imports torch, never JAX.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

Tensor = torch.Tensor
Build = Callable[[Mapping[str, Tensor]], Any]
"""A ``Build`` makes, of a call's tensors, what belongs in a place."""


class Stand:
    """A stand stands for a parameter or buffer wherever the copy of a module refers to it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return tensors.get(self.name)


def slot(table: Any, key: str) -> tuple[Any, str, Any]:
    """Return a place in a table of parameters or buffers, and what it holds between calls."""
    # The tables of TorchScript's modules, which are in C++, take tensors alone.
    return table, key, None if isinstance(table, dict) else torch.empty(0, dtype=table[key].dtype)


def stands_in(container: Any) -> list[tuple[Any, Any, Build]]:
    """Find where a dict or list refers to parameters beside the tables, and what belongs there."""
    if isinstance(container, set):
        return []  # whoever has the set refers to it: see ``_builder``
    items = container.items() if isinstance(container, dict) else enumerate(container)
    return [(container, key, build) for key, x in items if (build := _builder(x)) is not None]


def _builder(x: Any) -> Build | None:
    """Return how to make ``x`` of a call's tensors; None where no parameters are in it.

    Tuples are immutable, so whoever has one gets a new one.
    """
    if isinstance(x, Stand):
        return x
    if not isinstance(x, tuple | set | frozenset):
        return None
    parts = [(y, _builder(y)) for y in x]
    if all(build is None for _, build in parts):
        return None
    make = functools.partial(tuple.__new__, type(x)) if isinstance(x, tuple) else type(x)
    return lambda tensors: make(y if build is None else build(tensors) for y, build in parts)


def scripted_attributes(layout: Any, subs: Mapping[str, Any]) -> list[tuple[Any, str, Build, Any]]:
    """Return the same for attributes of TorchScript's modules, which are in C++.

    ``subs`` are the copies of the modules. Each item is a module, an attribute that its code reads,
    how to make its value, and what it holds between calls.
    """
    scripts = {
        path: sub
        for path, sub in layout.module.named_modules(remove_duplicate=False)
        if isinstance(sub, torch.jit.ScriptModule)
    }
    read = {name for sub in scripts.values() for name in _attributes_read(sub._c)}
    empty = {
        name: torch.empty(0, dtype=t.dtype, device="cpu")
        for group in layout.tensors.values()
        for name, t in group.items()
    }
    found = []
    for path, sub in scripts.items():
        tables = {*sub._parameters.keys(), *sub._buffers.keys(), *sub._modules.keys()}
        for name in sorted(read - tables):
            if sub._c.hasattr(name):
                build = _scripted(sub._c.getattr(name), layout.names)
                if build is not None:
                    found.append((subs[path]._c, name, build, build(empty)))
    return found


def _attributes_read(script: Any) -> set[str]:
    methods = [script._get_method(name) for name in script._method_names()]
    return {node.s("name") for m in methods for node in m.graph.findAllNodes("prim::GetAttr", True)}


def _scripted(x: Any, names: Mapping[int, str]) -> Build | None:
    """Return how to make ``x`` of a call's tensors; None where no parameters are in it."""
    if isinstance(x, Tensor):
        return Stand(names[id(x)]) if id(x) in names else None
    if isinstance(x, dict):
        values = _scripted(list(x.values()), names)
        return (
            None if values is None else lambda tensors: dict(zip(x, values(tensors), strict=True))
        )
    if not isinstance(x, list | tuple):
        return None
    parts = [(y, _scripted(y, names)) for y in x]
    if all(build is None for _, build in parts):
        return None
    return lambda tensors: type(x)(y if build is None else build(tensors) for y, build in parts)
