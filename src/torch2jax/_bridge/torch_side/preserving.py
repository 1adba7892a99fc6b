"""A run that only looks at a function leaves nothing behind. This file imports torch, never JAX.

Modules are as before in every attribute. Other objects, containers, globals and variables of
closures are as before only where the run put tensors in, so a counter in them counts. ``take_out``
finds by Python's garbage collector what the run put elsewhere, such as into a function under
``functools.lru_cache``.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from .reachable import Reached

Tensor = torch.Tensor


@contextlib.contextmanager
def preserved(roots: Iterable[Any]) -> Iterator[None]:
    """Restore what a function can reach, and torch's random state."""
    reached = Reached(roots)
    modules = _state_of_modules(reached)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), tensors_taken_out(reached):
        try:
            yield
        finally:
            for live, copy in modules:
                _refill(live, copy)


@contextlib.contextmanager
def restored_after(errors: type[Exception], roots: Iterable[Any]) -> Iterator[None]:
    """Restore what modules hold that a function can reach, where such an error ends the scope."""
    modules = _state_of_modules(Reached(roots))
    try:
        yield
    except errors:
        for live, copy in modules:
            _refill(live, copy)
        raise


def _state_of_modules(reached: Reached) -> list[tuple[Any, Any]]:
    """Return the attributes of modules, and the containers among them, each with a copy."""
    attributes = [(vars(m), dict(vars(m))) for m in reached.modules]
    containers = [
        (c, c.copy())
        for _, copy in attributes
        for c in copy.values()
        if isinstance(c, dict | list | set)
    ]
    return [*attributes, *containers]


@contextlib.contextmanager
def tensors_taken_out(reached: Reached) -> Iterator[None]:
    """Put back plain objects, containers, globals and closures into which tensors were put."""
    inside = [x for m in reached.modules for x in vars(m).values() if _is_plain(x)]
    objects = {id(x): x for x in (*reached.objects, *inside)}.values()
    groups = [_Group([vars(x), *_containers(vars(x).values())]) for x in objects]
    groups += [
        _Group([c, *_containers(_values(c))]) for c in reached.containers if type(c) in _CONTAINERS
    ]
    variables = [(g, {n: g[n] for n in names if n in g}) for g, names in reached.globals]
    cells = [(cell, cell.cell_contents) for cell in reached.cells]
    try:
        yield
    finally:
        for group in groups:
            group.restore()
        for live, copy in variables:
            new = [live.get(name) for name, old in copy.items() if live.get(name) is not old]
            if any(map(holds_tensor, new)):
                live.update(copy)
        for cell, old in cells:
            with contextlib.suppress(ValueError):  # the cell may be empty
                if cell.cell_contents is not old and holds_tensor(cell.cell_contents):
                    cell.cell_contents = old


class _Group:
    """A group has containers that belong together, such as an object's attributes and values."""

    def __init__(self, containers: Sequence[Any]) -> None:
        self._copies = [(c, c.copy()) for c in containers]

    def restore(self) -> None:
        if any(map(holds_tensor, self._new_values())):
            for live, copy in self._copies:
                _refill(live, copy)

    def _new_values(self) -> Iterator[Any]:
        for live, copy in self._copies:
            if len(live) == len(copy) and all(map(_same, _values(live), _values(copy))):
                continue
            before = set(map(id, _values(copy)))
            yield from (x for x in _values(live) if id(x) not in before)


def _same(a: Any, b: Any) -> bool:
    return a is b


def _values(container: Any) -> Iterable[Any]:
    return list(container.values()) if isinstance(container, dict) else list(container)


def _containers(values: Iterable[Any]) -> list[Any]:
    return [x for x in values if type(x) in _CONTAINERS]


_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


def _is_plain(x: Any) -> bool:
    return hasattr(x, "__dict__") and not isinstance(x, _NOT_PLAIN)


_NOT_PLAIN = (
    Tensor,
    torch.nn.Module,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    type,
    functools._lru_cache_wrapper,
    torch._C._FunctionBase,
    torch.autograd.function.FunctionCtx,
)


def holds_tensor(x: Any, depth: int = 3) -> bool:
    """Say whether a tensor lies in an object or a container, at most so many levels down."""
    if isinstance(x, Tensor):
        return True
    if depth == 0:
        return False
    if isinstance(x, dict | list | tuple | set):
        return any(holds_tensor(y, depth - 1) for y in _values(x))
    return _is_plain(x) and any(holds_tensor(y, depth - 1) for y in list(vars(x).values()))


def _refill(live: Any, copy: Any) -> None:
    same = len(live) == len(copy) and all(map(_same, _values(live), _values(copy)))
    if same and (not isinstance(live, dict) or list(live) == list(copy)):
        return
    live.clear()
    live.extend(copy) if isinstance(live, list) else live.update(copy)


# --- what a run left elsewhere -------------------------------------------------------------------


@contextlib.contextmanager
def thawed() -> Iterator[None]:
    """Let ``gc.get_referrers`` see what ``gc.freeze()`` has set aside; it is set aside again."""
    if not gc.get_freeze_count():
        yield
        return
    gc.collect()  # what is frozen as garbage would stay
    gc.unfreeze()
    try:
        yield
    finally:
        if next(_thaws) % 16 == 0:  # what was frozen alive may have become garbage
            gc.collect()
        gc.freeze()


_thaws = itertools.count(1)


def take_out(tensors: Sequence[Tensor]) -> None:
    """Take tensors that a trace made out of whatever keeps them, so that they are made again.

    A function under ``functools.lru_cache`` forgets its results. A dict loses the entry, and a list
    or a set loses the item, where a global, a class or an object has it. A variable is None again.
    So is an attribute, or it is gone where the class has it or ``__init__`` does not name it. What
    belongs to PyTorch or JAX stays as it is.
    """
    with thawed():
        _take_out(tensors)


def _take_out(tensors: Sequence[Tensor]) -> None:
    kept: list[Any] = list(tensors)
    caches_only = False
    for _ in range(4):
        held = set(map(id, kept))
        upwards: list[Any] = []
        for holder in gc.get_referrers(*kept):
            if isinstance(holder, functools._lru_cache_wrapper):
                holder.cache_clear()
            elif isinstance(holder, tuple):
                upwards.append(holder)
            elif caches_only or holder is kept or holder is tensors:
                continue
            elif isinstance(holder, dict):
                _take_out_of_dict(holder, held)
            elif isinstance(holder, list | set):
                items = [x for x in holder if id(x) not in held]
                if not items:  # perhaps it is a result in a cache
                    upwards.append(holder)
                if _owners(holder):
                    _refill(holder, items)
            elif _is_users(holder):
                for name in [n for n, x in vars(holder).items() if id(x) in held]:
                    _reset(holder, name)
                upwards.append(holder)
        if not upwards:
            return
        caches_only = not any(isinstance(x, tuple) for x in upwards)
        kept = upwards


def _take_out_of_dict(holder: dict[Any, Any], held: set[int]) -> None:
    names = [name for name, x in holder.items() if id(x) in held]
    referrers = gc.get_referrers(holder)
    objects = [x for x in referrers if getattr(x, "__dict__", None) is holder]
    classes = [x for x in referrers if isinstance(x, type) and _is_dict_of(x, holder)]
    if classes:
        for name in names:
            setattr(classes[0], name, None)
    elif "__builtins__" in holder:
        if not _is_librarys(str(holder.get("__name__"))):
            holder.update(dict.fromkeys(names))
    elif objects:
        for name in names if _is_users(objects[0]) else ():
            _reset(objects[0], name)
    elif any(isinstance(x, functools._lru_cache_wrapper) for x in referrers) or _owners(holder):
        with contextlib.suppress(Exception):  # some kinds of dict give nothing away
            for name in names:
                holder.pop(name, None)


def _owners(container: Any) -> list[Any]:
    """Return the globals, classes and objects that have a container as a variable."""
    found = []
    for x in gc.get_referrers(container):
        if isinstance(x, dict):
            if "__builtins__" in x:
                found += [] if _is_librarys(str(x.get("__name__"))) else [x]
            else:
                found += [y for y in gc.get_referrers(x) if _has_dict(y, x)]
        elif _is_users(x):
            found.append(x)
    return found


def _has_dict(owner: Any, d: dict[Any, Any]) -> bool:
    if isinstance(owner, type):
        return not _is_librarys(owner.__module__) and _is_dict_of(owner, d)
    return getattr(owner, "__dict__", None) is d and _is_users(owner)


def _is_dict_of(owner: type, d: dict[Any, Any]) -> bool:
    return "__module__" in d and all(vars(owner).get(name) is x for name, x in d.items())


def _is_users(x: Any) -> bool:
    """Return whether an object is a module, or a plain object of the user's."""
    if isinstance(x, torch.nn.Module):
        return True
    return _is_plain(x) and not _is_librarys(type(x).__module__)


_OURS = __name__.partition(".")[0]


def _is_librarys(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "jax", "jaxlib", _OURS)


def _reset(owner: Any, name: str) -> None:
    made = getattr(type(owner).__init__, "__code__", None)
    if hasattr(type(owner), name) or (made is not None and name not in made.co_names):
        vars(owner).pop(name, None)
    else:
        vars(owner)[name] = None
