"""Which operator of a call makes a large result, and how it can write that elsewhere.

This file imports torch, never JAX. A ``Watch`` sees the operators of a call and finds those whose
result the function returns. A ``Redirect`` sees the operators of a later call, and where the same
operator comes at the same place, it runs the operator's ``out=`` variant into a given buffer. All
else goes its ordinary way, and where anything differs, so does that operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..standins import without_compiler

Tensor = torch.Tensor


@dataclass(frozen=True)
class Step:
    """A step says which operator of a call makes a result."""

    at: int
    """How many operators of the call come before it."""
    operator: Any
    pointwise: bool
    operands: Any
    """What the shape, strides and dtype of its result depend on."""
    into: Any
    """``into(buffer, args, kwargs)`` runs the operator into a buffer."""
    shape: torch.Size
    dtype: torch.dtype
    result: int = -1
    """The index of the result of the call."""


class Watch(TorchDispatchMode):
    """A watch sees the operators of one call, and what they make."""

    supports_higher_order_operators = True

    def __init__(self, sizes: frozenset[int]) -> None:
        super().__init__()
        self.operators = 0
        self._sizes = sizes
        self._made: dict[int, Step | None] = {}
        """By address. An operator that gets the memory of one before replaces it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        at = self.operators
        self.operators = at + 1
        out = func(*args, **kwargs)
        for t in out if isinstance(out, tuple | list) else (out,):
            if is_plain(t):
                storage = t.untyped_storage()
                if storage.nbytes() in self._sizes and not _shares(storage, args, kwargs):
                    self._made[storage.data_ptr()] = (
                        _step(at, func, types, args, kwargs, t) if t is out else None
                    )
        return out

    def steps(self, results: Sequence[Tensor]) -> list[Step]:
        """Return the steps that make results, in the order of the call."""
        addresses = [t.untyped_storage().data_ptr() if is_plain(t) else 0 for t in results]
        found = []
        for i, (t, address) in enumerate(zip(results, addresses, strict=True)):
            step = self._made.get(address)
            if step is None or addresses.count(address) > 1:
                continue
            if not t.is_contiguous() or t.nbytes != t.untyped_storage().nbytes():
                continue
            if t.dtype is step.dtype:
                found.append(replace(step, result=i))
        return sorted(found, key=lambda step: step.at)


without_compiler(Watch)


class Redirect(TorchDispatchMode):
    """A redirect has the operators of ``steps`` write into ``buffers``."""

    supports_higher_order_operators = True

    def __init__(self, steps: Sequence[Step], buffers: Sequence[Tensor]) -> None:
        super().__init__()
        self._left = iter(steps)
        self._step = next(self._left)
        self._next = self._step.at
        self._buffers = buffers
        self._operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        at = self._operators
        self._operators = at + 1
        if at != self._next:
            return func(*args, **kwargs) if kwargs else func(*args)
        return self._redirected(func, types, args, kwargs or {})

    def _redirected(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        step = self._step
        self._next = -1
        if func is not step.operator or _may_be_kept(types):
            return func(*args, **kwargs)
        try:
            if _told(args, kwargs, step.pointwise) != step.operands:
                return func(*args, **kwargs)
        except _Unknown:
            return func(*args, **kwargs)
        buffer = self._buffers[step.result]
        if buffer.shape != step.shape:
            buffer = buffer.view(step.shape)
        try:
            out = step.into(buffer, args, kwargs)
        except Exception:
            return func(*args, **kwargs)  # whatever it was, the operator itself raises it
        self._step = next(self._left, step)
        if self._step is not step:
            self._next = self._step.at
        return out


without_compiler(Redirect)


def is_plain(t: Any) -> bool:
    """Return whether a tensor is of PyTorch's own class, strided and on a CPU."""
    return type(t) in _PLAIN and t.layout is torch.strided and t.device.type == "cpu"


_PLAIN = (Tensor, torch.nn.Parameter)


def _shares(storage: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a storage, or its memory, is that of an operand."""
    address = storage.data_ptr()
    return any(
        is_plain(x) and x.untyped_storage().data_ptr() == address
        for x in _flat((*args, *kwargs.values()))
    )


def _flat(items: Any) -> list[Any]:
    found = []
    for x in items:
        found += _flat(x) if isinstance(x, list | tuple) else [x]
    return found


def _step(at: int, func: Any, types: Any, args: Any, kwargs: Any, out: Tensor) -> Step | None:
    if _may_be_kept(types):
        return None
    storage = out.untyped_storage()
    if out.storage_offset() or not out.is_contiguous() or out.nbytes != storage.nbytes():
        return None
    if torch.Tag.nondeterministic_seeded in func.tags:
        return None
    pointwise = torch.Tag.pointwise in func.tags
    try:
        operands = _told(args, kwargs, pointwise)
    except _Unknown:
        return None
    into = _into(func)
    return into and Step(at, func, pointwise, operands, into, out.shape, out.dtype)


def _may_be_kept(types: Any) -> bool:
    """Return whether a graph or a tensor of another class may keep what an operator makes."""
    return bool(types) or torch.is_grad_enabled() or torch.is_inference_mode_enabled()


class _Unknown(Exception):
    """An operand whose effect on the result nobody knows."""


def _told(args: Any, kwargs: dict[str, Any], pointwise: bool) -> Any:
    """Return what tells apart calls of an operator with results of other kinds."""
    told = _each(args, pointwise)
    if kwargs:
        told.append(list(kwargs))
        told += _each(kwargs.values(), pointwise)
    return told


def _each(items: Any, pointwise: bool) -> list[Any]:
    told: list[Any] = []
    for x in items:
        kind = type(x)
        if kind in _PLAIN:
            if x.layout is not torch.strided or x.is_neg() or x.is_conj() or x._is_zerotensor():
                raise _Unknown
            told.append((x.shape, x.stride(), x.dtype, x.device))
        elif kind in _NUMBERS:
            # A number decides the shape of a result nowhere but in operators on whole tensors.
            told.append((kind, None if pointwise else x))
        elif kind is list or kind is tuple:
            told.append(_each(x, pointwise))
        elif x is None or kind in _SETTINGS:
            told.append(x)
        else:
            raise _Unknown
    return told


_NUMBERS = (bool, int, float, complex)
_SETTINGS = (str, torch.dtype, torch.device, torch.layout, torch.memory_format)


def _into(func: Any) -> Any:
    """Return how an operator writes into a buffer, or None where it cannot without a copy."""
    if func in _COPIES:
        return _copy
    schema = func._schema
    if len(schema.returns) != 1 or func.namespace != "aten":
        return None
    wanted = [(a.name, str(a.type)) for a in schema.arguments]
    packet = func.overloadpacket
    for name in packet.overloads():
        overload = getattr(packet, name)
        # PyTorch generates some that compute a result as ever, and copy it.
        if torch.Tag.generated in overload.tags:
            continue
        outs = [a.name for a in overload._schema.arguments if a.is_out]
        rest = [(a.name, str(a.type)) for a in overload._schema.arguments if not a.is_out]
        if len(outs) == 1 and rest == wanted and len(overload._schema.returns) == 1:
            return _Out(overload, outs[0])
    return None


class _Out:
    def __init__(self, overload: Any, name: str) -> None:
        self._overload, self._name = overload, name

    def __call__(self, buffer: Tensor, args: Any, kwargs: Any) -> Tensor:
        return self._overload(*args, **kwargs, **{self._name: buffer})


def _copy(buffer: Tensor, args: Any, kwargs: Any) -> Tensor:
    return buffer.copy_(args[0])


_COPIES: Any = frozenset({torch.ops.aten.clone.default, torch.ops.aten._to_copy.default})
