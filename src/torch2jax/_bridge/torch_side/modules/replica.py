"""Replicas of a module hold a call's tensors in its place. This file imports torch, never JAX.

The user's module is shared: calls run on several threads at once, and a graph may run part of the
module again in its backward pass. So no call puts its tensors into the module itself, as
``torch.func.functional_call`` does, but into a replica: a copy of the structure without parameters.
Replicas are pooled. Every call finds one as it was made: what a call caches in its attributes is
forgotten.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...._conversions.narrowed import NARROWED
from .places import Stand, scripted_attributes, slot, stands_in

Tensor = torch.Tensor
Module = torch.nn.Module
Place = tuple[str, str, str]
"""A place is the path of a submodule, ``_parameters`` or ``_buffers``, and a key in it."""


class Layout:
    """A layout knows the canonical names of a module's tensors, their places, dtypes and kinds."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.places: dict[str, list[Place]] = {}
        self.tensors: dict[str, dict[str, Tensor]] = {"params": {}, "frozen": {}, "buffers": {}}
        self.aliases: dict[str, str] = {}
        """Other names of tied tensors, and the name that stands for them."""
        self.names: dict[int, str] = {}
        """Canonical names by the tensors' ids."""
        for path, sub in module.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            for key, p in sub._parameters.items():
                if p is not None:
                    kind = "params" if p.requires_grad else "frozen"
                    self._add(prefix + key, p, kind, (path, "_parameters", key))
            for key, b in sub._buffers.items():
                if b is not None and key not in sub._non_persistent_buffers_set:
                    self._add(prefix + key, b, "buffers", (path, "_buffers", key))
        self.dtypes = {k: t.dtype for group in self.tensors.values() for k, t in group.items()}

    def _add(self, name: str, t: Tensor, kind: str, place: Place) -> None:
        canonical = self.names.setdefault(id(t), name)
        if canonical == name:
            self.tensors[kind][name] = t
        else:
            self.aliases[name] = canonical
        self.places.setdefault(canonical, []).append(place)


class Replica:
    """A replica is a copy of a module's structure, which takes tensors for one call at a time."""

    def __init__(self, layout: Layout, train: bool | None, wrap: Any) -> None:
        # Parameters and buffers come with each call; the replica owns all other tensors.
        memo: dict[int, Any] = {
            id(t): Stand(name) for g in layout.tensors.values() for name, t in g.items()
        }
        with CopiesAnyTensor():
            self.module: Module = copy.deepcopy(layout.module, memo)
        if train is not None:
            self.module.train(train)
        memo.pop(id(memo), None)  # deepcopy keeps the originals there
        copies = list(memo.values())
        subs = dict(self.module.named_modules(remove_duplicate=False))
        self.modules = list({id(m): m for m in subs.values()}.values())
        self.rnns = [m for m in self.modules if isinstance(m, torch.nn.RNNBase)]
        for rnn in self.rnns:
            rnn._flat_weights = []
        self._slots: dict[str, list[tuple[Any, str, Any]]] = {
            name: [slot(getattr(subs[path], table), key) for path, table, key in places]
            for name, places in layout.places.items()
        }
        self._scripted = scripted_attributes(layout, subs)
        self._empty()
        containers: dict[int, Any] = {}
        for x in (*copies, *self.modules):
            for c in (x, getattr(x, "__dict__", None), getattr(x, "keywords", None)):
                if isinstance(c, dict | list | set):
                    containers[id(c)] = c
        self._elsewhere = [found for c in containers.values() for found in stands_in(c)]
        for container, key, _ in self._elsewhere:
            container[key] = None
        self.dtypes = layout.dtypes
        self.call = wrap(self.module)
        owned = [x for x in copies if isinstance(x, Tensor)]
        owned += [b for m in self.modules for b in m._buffers.values() if b is not None]
        self._owned = [(x, x._version) for x in owned]
        self._pristine = [_Pristine(c) for c in containers.values()]
        self._references: list[int] = []

    def seal(self) -> Replica:
        """Count who refers to its modules now that nobody but the replica itself should."""
        self._references = self._count()
        return self

    def _count(self) -> list[int]:
        return [sys.getrefcount(m) for m in self.modules]

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Put in a call's tensors, each in the dtype of the module's own."""
        given: dict[str, Tensor] = {}
        for name, t in tensors.items():
            own = self.dtypes[name]
            if t.dtype is not own and NARROWED.get(own) is t.dtype:
                t = t.to(own)
            given[name] = t
            for table, key, _ in self._slots[name]:
                table[key] = t
        for container, key, build in self._elsewhere:
            container[key] = build(given)
        for script, key, build, _ in self._scripted:
            script.setattr(key, build(given))
        for rnn in self.rnns:
            rnn._flat_weights = [getattr(rnn, name) for name in rnn._flat_weights_names]

    def buffers(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the buffers as the call left them."""
        found = {}
        for name in names:
            table, key, _ = self._slots[name][0]
            found[name] = table[key]
        return found

    def referenced(self) -> bool:
        """Return whether something beside the pool, such as a graph, refers to the replica."""
        return any(map(operator.gt, self._count(), self._references))

    def clear(self) -> bool:
        """Forget the call: its tensors, and whatever it left in attributes.

        It returns False where the call wrote to tensors of the replica's own, which cannot be put
        back.
        """
        self._empty()
        for pristine in self._pristine:
            pristine.restore()
        return all(x._version == version for x, version in self._owned)

    def _empty(self) -> None:
        for slots in self._slots.values():
            for table, key, nothing in slots:
                table[key] = nothing
        for script, key, _, nothing in self._scripted:
            script.setattr(key, nothing)


class CopiesAnyTensor(TorchFunctionMode):
    """Tensors with a graph can be copied here, too, as the values that they have.

    A module may hold them anywhere: old ``weight_norm`` does, and so does whatever keeps an
    activation.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            x, memo = args
            if id(x) not in memo:
                memo[id(x)] = x.detach().clone()
            return memo[id(x)]
        return func(*args, **(kwargs or {}))


class _Pristine:
    """A ``_Pristine`` knows a container, such as a module's attributes, and what that held."""

    def __init__(self, live: Any) -> None:
        self.live, self.copy, self.size = live, live.copy(), len(live)
        self.values = list(live.values()) if isinstance(live, dict) else list(live)

    def restore(self) -> None:
        # Nearly always nothing has changed; seeing that must be cheap.
        live = self.live
        if len(live) == self.size:
            values = live.values() if type(live) is not list and isinstance(live, dict) else live
            if all(map(operator.is_, values, self.values)):
                return
        live.clear()
        live.extend(self.copy) if isinstance(live, list) else live.update(self.copy)
