"""A walk looks once at all that a compiled function can reach; see NOTE [What selects a program].

The key numbers things in the order in which they are met, so it also tells which of them are the
same.
"""

from __future__ import annotations

import argparse
import enum
import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..tensors.tensor import Tensor

__all__ = ["EMPTY", "Walk", "contents", "meta"]

_MANY = 1000
"""Of plain containers with more items only the number of items is looked at."""
_ITEMS = 100_000

EMPTY = object()
_OURS = __name__.partition(".")[0]
_CLOSED = {*sys.stdlib_module_names, "torch", "jax", "jaxlib", "numpy", "flax", "optax", _OURS}
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_OPEN = (torch.nn.Module, torch.optim.Optimizer, types.SimpleNamespace, argparse.Namespace)
_Generator: Any = torch._C.Generator


def contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return EMPTY


def meta(t: Tensor) -> Any:
    """Return what selects a program in a tensor, except its memory."""
    leaf = id(t) if t.requires_grad and t.is_leaf else t.requires_grad
    return (t.dtype, t.shape, leaf, None if t._chain is None else t._chain.pattern)


class Walk:
    """A walk looks once at everything, and collects the key and what later looks compare.

    Of containers it reads what they hold, past the methods that a class of the user's has.
    """

    def __init__(self, volatile: set[tuple[int, Any]], names: set[str]) -> None:
        self.volatile, self.names = volatile, names
        self.key: list[Any] = []
        self.pins: list[Any] = []
        self.reads: list[Callable[[], Any]] = []
        self.containers: list[Any] = []
        self.empty: list[Any] = []
        self.read_of: dict[int, Any] = {}
        self.tensors: list[Tensor] = []
        self.metas: list[Any] = []
        self.foreign: list[torch.Tensor] = []
        self.generators: list[Any] = []
        self.cells: dict[int, int] = {}
        self.alive: list[Any] = []
        self.seen: dict[Any, int] = {}

    def value(self, x: Any, depth: int) -> None:
        t = type(x)
        if t in _PLAIN_TYPES or isinstance(x, _PLAIN):
            self.key += (t, repr(x) if t is float else x)
        elif isinstance(x, enum.Enum):
            self.key += (t, x.name)
        elif isinstance(x, tuple):
            self.key += (t, tuple.__len__(x))
            for y in tuple.__iter__(x):
                self.value(y, depth + 1)
        elif t is Tensor:
            if self.first(id(x)):
                self.tensors.append(x)
                self.metas.append(meta(x))
                memory = self.cells.setdefault(id(x._cell), len(self.cells))
                self.key += (self.metas[-1], memory)
        elif isinstance(x, _Generator):
            if self.first(("generator", x._cdata)):
                self.generators.append(x)
        elif self.first(id(x)) and len(self.seen) < _ITEMS and depth < 60:
            self.thing(x, t, depth)

    def first(self, name: Any) -> bool:
        """Say whether it is met for the first time. Its number becomes part of the key."""
        number = self.seen.get(name)
        if number is None:
            self.seen[name] = len(self.seen)
        self.key.append(number)
        return number is None

    def thing(self, x: Any, t: Any, depth: int) -> None:
        self.alive.append(x)
        if isinstance(x, torch.Tensor):
            self.pin(x)
            if not x.is_inference():
                self.foreign.append(x)
                self.key.append(x._version)
        elif isinstance(x, dict):
            if self.counted(t, dict.__len__(x)):
                self.items(x, depth)
        elif isinstance(x, list):
            if self.counted(t, list.__len__(x)):
                read = functools.partial(list.__iter__, x)
                self.contain(x, read, list.__len__(x))
                for y in read():
                    self.item(x, None, y, depth)
        elif isinstance(x, set | frozenset | deque):
            base: Any = next(c for c in (set, frozenset, deque) if isinstance(x, c))
            if self.counted(t, base.__len__(x)):
                read = functools.partial(base.__iter__, x)
                self.reads.append(read)
                for y in read():
                    self.value(y, depth + 1)
        elif isinstance(x, types.FunctionType):
            self.function(x, depth)
        elif isinstance(x, types.MethodType):
            self.value(x.__func__, depth + 1)
            self.value(x.__self__, depth + 1)
        elif isinstance(x, functools.partial):
            for y in (x.func, x.args, x.keywords):
                self.value(y, depth + 1)
        elif isinstance(x, _OPEN):
            self.key.append(t)
            self.items(vars(x), depth)
            self.methods(t, depth)
        elif isinstance(x, type | types.ModuleType) or _root(t) in _CLOSED:
            self.pin(x)
        elif hasattr(x, "__dict__"):
            self.key.append(t)
            self.methods(t, depth)
            self.attributes(vars(x), depth)
        else:
            self.pin(x)

    def counted(self, t: Any, n: int) -> bool:
        """Take down how many items a container has, and say whether each is looked at."""
        self.key += (t, n)
        return n <= _MANY

    def contain(self, container: Any, read: Callable[[], Any], n: int) -> None:
        self.containers.append(container)
        if n:
            self.read_of[len(self.reads)] = container
            self.reads.append(read)
        else:
            self.empty.append(container)

    def attributes(self, d: dict[str, Any], depth: int) -> None:
        """Look at the attributes that the code names; the object may have many others."""
        self.containers.append(d)
        named = [k for k in d if k in self.names]
        self.reads.append(functools.partial(map, d.get, named))
        self.reads.append(lambda: (len(d),))
        for k in named:
            self.key.append(k)
            self.item(d, k, d[k], depth)

    def methods(self, t: Any, depth: int) -> None:
        """Look at the methods that the code names, and at those that their code names."""
        if self.first(("methods", id(t))):
            found = True
            done: set[str] = set()
            bodies = [vars(c) for c in t.__mro__ if _root(c) not in _CLOSED]
            while found:
                found = False
                for body in bodies:
                    for k in body.keys() & self.names - done:
                        f = body[k]
                        f = f.fget if isinstance(f, property) else getattr(f, "__func__", f)
                        if isinstance(f, types.FunctionType):
                            found = True
                            done.add(k)
                            self.value(f, depth + 1)

    def pin(self, x: Any) -> None:
        self.key.append(id(x))
        self.pins.append(x)

    def items(self, d: dict[Any, Any], depth: int) -> None:
        self.contain(d, functools.partial(dict.values, d), dict.__len__(d))
        for k, y in list(dict.items(d)):
            if type(k) is str:
                self.key.append(k)
            else:
                self.value(k, depth + 1)
            self.item(d, k, y, depth)

    def item(self, container: Any, k: Any, y: Any, depth: int) -> None:
        if (id(container), k) not in self.volatile:
            self.value(y, depth + 1)

    def function(self, f: Any, depth: int) -> None:
        self.pin(f.__code__)
        if _root(f) in _CLOSED:
            return
        self.names.update(_names(f.__code__))
        cells: Sequence[Any] = f.__closure__ or ()
        if cells:
            self.containers += cells
            self.reads.append(functools.partial(map, contents, cells))
            for cell in cells:
                self.item(cell, 0, contents(cell), depth)
        for y in (f.__defaults__, f.__kwdefaults__):
            if y:
                self.value(y, depth + 1)
        names = [k for k in _names(f.__code__) if _is_state(f.__globals__.get(k))]
        if names:
            self.reads.append(functools.partial(map, f.__globals__.get, names))
            for k in names:
                self.value(f.__globals__[k], depth + 1)


_PLAIN_TYPES = frozenset({int, float, bool, str, type(None)})


def _root(x: Any) -> str:
    return (getattr(x, "__module__", None) or "").partition(".")[0]


def _is_state(x: Any) -> bool:
    """Say whether a global is state: no module, no class and no function of a library."""
    if x is None or isinstance(x, types.ModuleType | type | types.BuiltinFunctionType):
        return False
    return not (isinstance(x, types.FunctionType) and _root(x) in _CLOSED)


@functools.cache
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names in a function's code, and strings, which ``getattr`` may take."""
    found = dict.fromkeys(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            found.update(dict.fromkeys(_names(const)))
        elif isinstance(const, str):
            found[const] = None
    return tuple(found)
