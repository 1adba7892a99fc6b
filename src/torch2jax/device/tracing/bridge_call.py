"""A module on device "jax" is called through the bridge, in the midst of a trace.

The bridge runs a replica of the module in PyTorch's own memory. All tensors that the module holds
and those among the arguments are operands, so JAX has gradients of parameters as well. Whatever the
call changes comes back as a result: buffers and arguments that it writes to, buffers that it
replaces, and attributes that it sets. What cannot come back is refused before the call.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import torch
from jax.core import Tracer
from jax.tree_util import tree_flatten_with_path
from torch.utils._python_dispatch import _disable_current_modes

from ..._bridge.calls.checks import argument_label
from ..._bridge.calls.function import TorchFunction
from ..._bridge.calls.options import Options
from ..._bridge.calls.planning import Known
from ..._bridge.torch_side.exceptions import clear_frames
from ..._bridge.torch_side.modules.forward import Forward
from ..._bridge.torch_side.modules.replica import CopiesAnyTensor, Layout, Replica
from ..._bridge.torch_side.preserving import holds_tensor
from ..._compat.torch import transforms_active
from ..._errors import Torch2JaxError, Torch2JaxWarning, TorchCallError
from .. import random_streams
from ..operators.constants import value_of
from ..operators.jax_function import apply_jax
from ..operators.operands import from_other_device, note_read
from ..tensors.tensor import Tensor, captures, wrap
from ..thread_state import state
from .packed import NotBridged, Packed

__all__ = ["Known", "NotBridged", "call_on_bridge", "operands_of"]


class Operands(NamedTuple):
    """The operands of a module's call: its own tensors by their sorted names, then those given."""

    layout: Layout
    own: dict[str, torch.Tensor]
    names: list[str]
    given: list[torch.Tensor]
    arguments: Packed

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, on our device."""
        return [from_other_device(x) for x in (*[self.own[k] for k in self.names], *self.given)]


def operands_of(module: torch.nn.Module, args: Any, kwargs: Any) -> Operands:
    """Return the operands of ``module(*args, **kwargs)``, or raise ``NotBridged``."""
    try:
        with _disable_current_modes():
            layout, own = _layout_of(module)
    except Exception as error:
        raise NotBridged(f"it cannot be copied ({error}).") from error
    given: list[torch.Tensor] = []
    arguments = Packed.of((args, kwargs), given, "it takes")
    return Operands(layout, own, sorted(own), given, arguments)


def call_on_bridge(
    module: torch.nn.Module, args: Any, kwargs: Any, known: Known | None = None
) -> Any:
    """Return what ``module(*args, **kwargs)`` returns, computed on the bridge.

    It raises ``NotBridged`` where that cannot be, before anything has changed. ``known`` has values
    of the operands of this call.
    """
    if transforms_active():
        raise NotBridged("it is called inside of a transform of torch.func.")
    call = operands_of(module, args, kwargs)
    layout, own, names, given, arguments = call
    operands = call.tensors
    if captures:
        note_read(operands)
    arrays = [value_of(x) for x in operands]
    dtypes = [x.dtype for x in operands]
    replica = _OnReplica(layout, arguments)
    function = _function(replica, names, arrays, dtypes)
    if known is not None and len(known.values) != len(arrays):
        known = None
    changed, draws = _learn(function, replica, names, arrays, known)
    for x in (own.get(k) if isinstance(k, str) else given[k] for k in changed):
        if x is not None and type(x) is not Tensor:
            raise NotBridged(f"it writes to a tensor on {x.device}.")
    if changed or draws:
        replica = _OnReplica(layout, arguments, changed)
        function = _function(replica, names, arrays, dtypes, draws)
        _learn(function, replica, names, arrays, known)
    assert replica.seen.structure is not None
    needs = None
    if len(replica.seen.dtypes) > replica.seen.returned:
        needs = _needing_gradients(replica, names, arrays, dtypes, draws, known)
    replica.values = {}
    key = {"rng": random_streams.next_words()} if draws else {}
    count = len(names)

    def run(arrays: Sequence[Any]) -> Any:
        return function(dict(zip(names, arrays, strict=False)), list(arrays[count:]), **key)

    found = apply_jax(run, operands)
    found = [
        x if x.dtype is d else wrap(value_of(x), d)
        for x, d in zip(found, replica.seen.dtypes, strict=True)
    ]
    if needs is not None:
        found = [x if n else x.detach() for x, n in zip(found, needs, strict=True)]
    results = len(found) - len(changed)
    for k, new in zip(changed, found[results:], strict=True):
        if not isinstance(k, str):
            _write(given[k], new)
        elif k in replica.seen.replaced:
            for path, table, key_ in layout.places[k]:
                getattr(module.get_submodule(path), table)[key_] = new
        else:
            _write(own[k], new)
    out, new_attributes, gone = replica.seen.structure.unpacked(found[:results])
    modules = list(module.modules())
    for i, name in gone:
        vars(modules[i]).pop(name, None)
    for (i, name), value in new_attributes:
        vars(modules[i])[name] = value
    return out


def _write(x: torch.Tensor, new: torch.Tensor) -> None:
    if x.requires_grad and x.is_leaf:
        with torch.no_grad():
            x.copy_(new)
    else:
        x.copy_(new)


# --- the module and its tensors ------------------------------------------------------------------


def _layout_of(module: torch.nn.Module) -> tuple[Layout, dict[str, torch.Tensor]]:
    """Return the layout of a copy without values, and the module's tensors by their names there.

    The copy keeps tensors of other devices that are neither parameters nor buffers.
    """
    stands: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def stand(x: torch.Tensor) -> torch.Tensor:
        if id(x) not in stands:
            stands[id(x)] = torch.empty(x.shape, dtype=x.dtype, device="meta"), x
        return stands[id(x)][0]

    memo: dict[int, Any] = {}
    for sub in module.modules():
        buffers = [b for k, b in sub._buffers.items() if k not in sub._non_persistent_buffers_set]
        for x in (*sub._parameters.values(), *buffers):
            if x is not None:
                memo[id(x)] = stand(x)
    before, state.copying = state.copying, stand
    try:
        with CopiesAnyTensor():
            layout = Layout(copy.deepcopy(module, memo))
    finally:
        state.copying = before
    others = layout.tensors.setdefault("others", {})
    for meta, _ in stands.values():
        if id(meta) not in layout.names:
            name = layout.names[id(meta)] = f"{len(others)} beside the parameters"
            others[name], layout.places[name], layout.dtypes[name] = meta, [], meta.dtype
    return layout, {layout.names[id(meta)]: x for meta, x in stands.values()}


def _function(
    replica: _OnReplica,
    names: Sequence[str],
    arrays: Sequence[Any],
    dtypes: Sequence[torch.dtype],
    draws: bool = False,
) -> TorchFunction:
    label = type(replica.layout.module).__qualname__
    count = len(names)
    paths, _ = tree_flatten_with_path(
        ((dict(zip(names, arrays, strict=False)), list(arrays[count:])), {})
    )
    replica.values = {argument_label(path): x for path, x in paths if not isinstance(x, Tracer)}
    options = Options(
        arg_dtypes=(dict(zip(names, dtypes, strict=False)), list(dtypes[count:])),
        stochastic=draws,
        vmap_method="sequential",  # no batch answers questions
        default_device=torch.device("cpu"),
    )
    return TorchFunction(replica, replica, label, options)


def _learn(
    function: TorchFunction,
    replica: _OnReplica,
    names: Sequence[str],
    arrays: Sequence[Any],
    known: Known | None,
) -> tuple[list[Any], bool]:
    """Return what a call changes, names or numbers of arguments, and whether it draws numbers."""
    count = len(names)
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    given = dict(zip(names, structs, strict=False)), structs[count:]
    handled = sys.exc_info()[1]
    try:
        with warnings.catch_warnings():
            # It notes copies of what is changed, which here comes back.
            warnings.simplefilter("ignore", Torch2JaxWarning)
            binding, _ = function.binding_for(given, {}, known=known)
    except Torch2JaxError as error:
        clear_frames(error, handled)
        refused = NotBridged(replica.seen.refusal or str(error))
        refused.lacks_values = replica.seen.refusal is None and isinstance(error, TorchCallError)
        raise refused from error
    if replica.seen.refusal is not None:
        raise NotBridged(replica.seen.refusal)
    written = {names[i] if i < count else i - count for i in binding.arguments.copies}
    changed = sorted(written | replica.seen.written | replica.seen.replaced, key=str)
    replica.learns = False
    return changed, binding.callee.options.rng is not None


def _needing_gradients(
    like: _OnReplica,
    names: Sequence[str],
    arrays: Sequence[Any],
    dtypes: Sequence[torch.dtype],
    draws: bool,
    known: Known | None,
) -> list[bool] | None:
    """Return which tensors have gradients in PyTorch; None where no run can tell.

    State must not get a graph: moving averages are made without one.
    """
    replica = _OnReplica(like.layout, like.arguments, like.changed)
    replica.asks_gradients = True
    try:
        function = _function(replica, names, arrays, dtypes, draws)
        _learn(function, replica, names, arrays, known)
    except NotBridged:
        return None
    return replica.seen.needs


@dataclasses.dataclass
class _Seen:
    """What runs have shown. It is an object of its own, because inference restores attributes."""

    structure: Packed | None = None
    """The structure of results and attributes."""
    dtypes: list[torch.dtype] = dataclasses.field(default_factory=list)
    replaced: set[str] = dataclasses.field(default_factory=set)
    """Parameters and buffers in whose place a call has put other tensors."""
    written: set[Any] = dataclasses.field(default_factory=set)
    """Operands whose version counters moved, as copies of another dtype show alone."""
    needs: list[bool] | None = None
    """Which tensors have gradients in PyTorch, if that was asked."""
    returned: int = 0
    """How many of the tensors are the call's own results."""
    refusal: str | None = None
    """Why the call cannot go through the bridge."""


class _OnReplica(Forward):
    """It runs a replica on ``(the module's tensors by name, tensors among the arguments)``.

    It returns the tensors among the results, among attributes that were set, and those of
    ``changed`` as the call left them.
    """

    def __init__(self, layout: Layout, arguments: Packed, changed: Sequence[Any] = ()) -> None:
        super().__init__(layout, None, lambda replica: replica, True)
        # PyTorch has no derivative with respect to the statistics of a normalisation.
        self.never_differentiated = tuple(
            f"args[0]['{name}']"
            for name, places in layout.places.items()
            for path, table, _ in places
            if table == "_buffers"
            and isinstance(layout.module.get_submodule(path), torch.nn.modules.batchnorm._NormBase)
        )
        self.arguments, self.changed = arguments, changed
        self.seen = _Seen()
        self.learns = True
        """Whether it runs to see what a call changes."""
        self.asks_gradients = False
        """Whether it runs to see which tensors have gradients."""

    def __call__(self, own: Mapping[str, Any], given: Sequence[Any], /) -> Any:  # type: ignore[override]
        own = {k: x.clone() if k in self.changed else x for k, x in own.items()}
        given = [x.clone() if i in self.changed else x for i, x in enumerate(given)]
        if not self.asks_gradients:
            return self.on_replica(own, functools.partial(self._call, own, given))
        with torch.enable_grad():
            buffers = self.layout.tensors["buffers"]
            own = {k: x if k in buffers else self._asking(k, x) for k, x in own.items()}
            given = [self._asking(None, x) for x in given]
            out = self.on_replica(own, functools.partial(self._call, own, given))
        self.seen.needs = [x.requires_grad for x in out]
        return [x.detach() for x in out]

    def _asking(self, name: str | None, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor that needs a gradient, as a leaf where it is a parameter."""
        if not (x.is_floating_point() or x.is_complex()):
            return x
        leaf = x.detach().requires_grad_()
        places = self.layout.places[name] if name is not None else ()
        return leaf if any(table == "_parameters" for _, table, _ in places) else leaf.clone()

    def _call(
        self, own: Mapping[str, Any], given: Sequence[Any], replica: Replica
    ) -> list[torch.Tensor]:
        args, kwargs = self.arguments.unpacked(given)
        names = [name for name, places in self.layout.places.items() if places]
        filled = {**own, **replica.buffers(names)}
        operands = {**filled, **dict(enumerate(given))}
        versions = {k: x._version for k, x in operands.items()} if self.learns else {}
        before = [dict(vars(m)) for m in replica.modules]
        kept = [_containers_of(x) for x in before]
        out = replica.call(*args, **kwargs)
        new = [
            ((i, k), x)
            for i, (m, was) in enumerate(zip(replica.modules, before, strict=True))
            for k, x in vars(m).items()
            if was.get(k, _ABSENT) is not x
        ]
        gone = [
            (i, k)
            for i, (m, was) in enumerate(zip(replica.modules, before, strict=True))
            for k in was
            if k not in vars(m)
        ]
        after = {**operands, **replica.buffers(names)}
        self.seen.replaced |= {k for k in names if after[k] is not filled[k]}
        self.seen.written |= {
            k for k, version in versions.items() if operands[k]._version != version
        }
        tensors: list[torch.Tensor] = []
        try:
            self._refuse_changes(args, kwargs, given, kept)
            Packed.of(out, tensors, "it returns")
            self.seen.returned = len(tensors)
            tensors.clear()
            found = Packed.of((out, new, gone), tensors, "it keeps")
        except NotBridged as error:
            self.seen.refusal = str(error)
            raise
        if not tensors:
            self.seen.refusal = "it returns no tensor."
        if self.seen.structure is None:
            self.seen.structure = found
        elif self.seen.structure != found:
            self.seen.refusal = (
                "it returns, or sets as attributes, other Python values when the values of tensors "
                "are others. Make them tensors."
            )
            raise NotBridged(self.seen.refusal)
        for k in self.changed:
            tensors.append(after[k])
        self.seen.dtypes = [x.dtype for x in tensors]
        return tensors

    def _refuse_changes(self, args: Any, kwargs: Any, given: Any, kept: Any) -> None:
        again: list[torch.Tensor] = []
        same = Packed.of((args, kwargs), again, "it takes") == self.arguments
        if not same or any(x is not y for x, y in zip(again, given, strict=True)):
            raise NotBridged("it changes a list or dict among its arguments.")
        for live, was in (pair for pairs in kept for pair in pairs):
            if not _same_items(live, was) and holds_tensor(live):
                raise NotBridged("it puts tensors into a list or dict of its own.")


_ABSENT = object()
_TABLES = ("_parameters", "_buffers", "_modules")


def _containers_of(attributes: dict[str, Any]) -> list[tuple[Any, list[Any]]]:
    return [
        (x, _items_of(x))
        for k, x in attributes.items()
        if type(x) in (dict, list, set) and k not in _TABLES
    ]


def _items_of(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)


def _same_items(container: Any, was: list[Any]) -> bool:
    now = _items_of(container)
    return len(now) == len(was) and all(x is y for x, y in zip(now, was, strict=True))
