"""A recorder sees what a function draws, writes and keeps while its result is inferred."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from .integers import NATIVE_NAMESPACES, IntegerUse


class Recorder(TorchDispatchMode):
    """A recorder sees each operator of a run: which draw, which a library owns, what they write."""

    def __init__(
        self,
        operands: Sequence[torch.Tensor],
        integers: IntegerUse | None = None,
        call: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self._call = call or _call
        self.last: str | None = None
        self.draws: str | None = None
        self.no_forward = False
        self.sparse_gradients = False
        self.written: set[int] = set()
        """Operands that were written. Version counters do not tell, as ``_foreach`` moves none."""
        self._operands = {x.untyped_storage()._cdata: i for i, x in enumerate(operands)}
        self._created: set[int] = set()
        self._outside: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._generators: list[tuple[torch.Generator, torch.Tensor]] = []
        self._integers = integers or IntegerUse()
        if integers is not None:
            integers.start(operands)
        self._results: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _VALUE_OF and not isinstance(args[0], torch.Tensor):
            return args[0]  # a number of TorchScript's, which arrives as what it is
        if func.namespace != "prim":  # these query a device or a layout
            self.last = str(func)
        if torch.Tag.nondeterministic_seeded in func.tags and draws(func._schema, args, kwargs):
            self.draws = self.draws or str(func)
            generator = kwargs.get("generator")
            if generator is not None:
                self._generators.append((generator, generator.get_state()))
        if func.namespace not in NATIVE_NAMESPACES or _pushes_wrong(func, args, kwargs):
            self.no_forward = True
        at = _LOOKUPS.get(func._schema.name)
        if at is not None and (args[at:] or (kwargs.get("sparse_grad"),))[0] is True:
            self.sparse_gradients = True
        if func._schema.is_mutable or func._schema.name in _STATISTICS_WRITERS:
            self._note_writes(func._schema, args, kwargs)
        sources = self._integers.before(func, args, kwargs)
        out = self._call(func, args, kwargs)
        self._integers.after(out, sources)
        # What an operator writes may be the user's own tensor, which it returns.
        given = set(map(id, tree_leaves((args, kwargs)))) if func._schema.is_mutable else ()
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and id(t) not in given:
                self._results.append(weakref.ref(t))
                if t.layout is torch.strided and not func._schema.is_mutable:
                    self._created.add(t.untyped_storage()._cdata)
        return out

    def _note_writes(self, schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for i, argument in enumerate(schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            declared = argument.alias_info is not None and argument.alias_info.is_write
            if not declared and not _writes_statistics(schema, argument.name, args):
                continue
            for t in tree_leaves(value):
                if not isinstance(t, torch.Tensor) or t.layout is not torch.strided:
                    continue
                storage = t.untyped_storage()._cdata
                if storage in self._operands:
                    self.written.add(self._operands[storage])
                elif storage not in self._created and type(t) in _REAL:
                    # A tensor of the user's is written even where the operands are fake.
                    with _disable_current_modes():
                        self._outside.append((t, t.detach().clone()))

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Put back the tensors and generators outside of the run that it wrote."""
        try:
            yield
        finally:
            with torch.no_grad(), _disable_current_modes():
                for live, copy in reversed(self._outside):
                    live.detach().copy_(copy)
                for generator, state in reversed(self._generators):
                    generator.set_state(state)

    def alive(self) -> list[torch.Tensor]:
        """Return the tensors that the run made and something still keeps."""
        if any(r() is not None for r in self._results):
            gc.collect()
        return [t for r in self._results if (t := r()) is not None]


_VALUE_OF: Any = torch.ops.aten._local_scalar_dense.default


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _pushes_wrong(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether torch's forward mode is silently wrong where its reverse mode is right.

    Products of ``scatter_reduce`` have a tangent of zero. The others take a tangent for symmetric
    or triangular, as they take the operand, and they read parts of it that reverse mode leaves out.
    """
    name = func._schema.name
    if name in ("aten::scatter_reduce", "aten::scatter_reduce_"):
        return "prod" in (*args[4:], *kwargs.values())
    return name in ("aten::linalg_cholesky_ex", "aten::_linalg_eigh", "aten::triangular_solve")


def _writes_statistics(schema: Any, argument: str, args: tuple[Any, ...]) -> bool:
    """Return whether an argument is among the statistics that normalisations write undeclared."""
    if schema.name not in _STATISTICS_WRITERS or not argument.startswith("running_"):
        return False
    training = _STATISTICS_WRITERS[schema.name]
    return training is None or bool(args[training])


_STATISTICS_WRITERS = {
    "aten::native_batch_norm": 5,
    "aten::cudnn_batch_norm": 5,
    "aten::miopen_batch_norm": 5,
    "aten::batch_norm_update_stats": None,
    "aten::batch_norm_gather_stats": None,
    "aten::batch_norm_gather_stats_with_counts": None,
}
"""The place of their argument ``training``; None where they always write."""


_LOOKUPS = {
    "aten::embedding": 4,
    "aten::_embedding_bag": 5,
    "aten::_embedding_bag_forward_only": 5,
    "aten::gather": 3,  # by keyword
}
"""Their argument ``sparse`` stands there."""


def draws(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an operator that can draw does so: a dropout of zero draws nothing."""
    given = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
    if "bernoulli" in schema.name:
        return True
    if any(given.get(name) is False for name in ("train", "training")):
        return False
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    chances = [{**defaults, **given}.get(name) for name in ("dropout_p", "dropout", "p")]
    return not any(isinstance(p, int | float) and p == 0 for p in chances)


_REAL = (torch.Tensor, torch.nn.Parameter)
