"""Compiled graphs refer to programs and functions by name."""

from __future__ import annotations

import itertools
import secrets
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import torch

from .._compat.jax import settings, under
from .._conversions.dtypes import canonical, needs_x64
from .._errors import Torch2JaxError, UnsupportedDtypeError
from .autograd import Call
from .programs import JaxProgram
from .residuals import Traced

named: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""The functions of ``jax2torch`` by the keys with which compiled graphs refer to them."""


Tensor = torch.Tensor

_PROCESS = secrets.token_hex(8)
_numbers = itertools.count()
_sites: weakref.WeakValueDictionary[str, Site] = weakref.WeakValueDictionary()


class Site:
    """A site is a program with the kinds of its operands.

    The program keeps the site alive, and graphs hold its name. The program runs under JAX's
    ``settings`` of the call that was traced. ``kinds`` are "tensor", "float",
    "int", or a tuple of one value that is a part of the graph. The operands after the first
    ``n_primals`` are cotangents, and at the end there are ``n_held`` held values.
    """

    def __init__(
        self,
        program: JaxProgram,
        kinds: tuple[Any, ...],
        n_primals: int,
        n_held: int,
        settings: tuple[Any, ...],
    ) -> None:
        self._program = weakref.ref(program)
        self.kinds, self.n_primals, self.n_held, self.settings = kinds, n_primals, n_held, settings
        self.tensors = [i for i, kind in enumerate(kinds) if kind == "tensor"]
        self.name = f"{program.name}/{_PROCESS}/{next(_numbers)}"
        _sites[self.name] = self

    @property
    def program(self) -> JaxProgram:
        program = self._program()
        if program is None:
            raise gone(self.name)
        return program

    @staticmethod
    def of(
        program: JaxProgram,
        kinds: tuple[Any, ...],
        n_primals: int,
        n_held: int,
        settings: tuple[Any, ...],
    ) -> Site:
        """Return the one site of a program for these operands."""
        key = (kinds, n_primals, n_held, settings)
        site = program.sites.get(key)
        return site or program.sites.setdefault(key, Site(program, *key))

    def operands(self, tensors: Sequence[Any], floats: Sequence[Any], ints: Sequence[Any]) -> Any:
        """Return the operands in their order."""
        given = {"tensor": iter(tensors), "float": iter(floats), "int": iter(ints)}
        return [next(given[k]) if isinstance(k, str) else k[0] for k in self.kinds]

    def run(self, operands: Sequence[Any]) -> list[Tensor]:
        """Return the results, then the residuals."""
        call = Call(self.program, self.settings, self.n_primals)
        if settings() == self.settings:
            return list(call.run(operands))
        with under(self.settings):  # a backward pass on a GPU has a thread of PyTorch's own
            return list(call.run(operands))

    def shapes(self, operands: Sequence[Any]) -> Traced:
        """Return what ``run`` will return, without computing; ``run`` finds the trace again."""
        reads = self.program.reads
        with under(self.settings):
            avals = [
                None if reads is not None and i < self.n_primals and i not in reads else aval_of(x)
                for i, x in enumerate(operands)
            ]
            return self.program.jitted.eval_shape(*avals)  # type: ignore[attr-defined]


def kind_of(x: Any) -> Any:
    """Return the kind of an operand, as ``Site`` has it."""
    if isinstance(x, Tensor):
        return "tensor"
    if type(x) in (float, torch.SymFloat):
        return "float"
    if type(x) in (int, torch.SymInt):
        return "int"
    return _Constant(x)


class _Constant(tuple):
    """A constant is an operand in the graph itself: ``(value,)``, equal by value or by identity."""

    def __new__(cls, value: Any) -> _Constant:
        return super().__new__(cls, (value,))

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constant) and self._key() == other._key()

    def _key(self) -> Any:
        value = self[0]
        return type(value), value if isinstance(value, bool | complex) else id(value)


def aval_of(x: Any) -> Any:
    """Return the operand without its values: a tensor's shape and dtype, or a number."""
    if not isinstance(x, Tensor):
        number = {torch.SymFloat: float, torch.SymInt: int}.get(type(x))
        return x if number is None else number(x)
    if needs_x64(x.dtype):
        raise UnsupportedDtypeError(
            f"got a tensor of {x.dtype}, and 64-bit values are switched off in JAX. Switch them "
            'on, jax.config.update("jax_enable_x64", True), or convert the tensor first.'
        )
    # Sizes that the graph leaves open become fixed: JAX compiles for each shape.
    return jax.ShapeDtypeStruct(tuple(map(int, x.shape)), canonical(x.dtype))


def site_named(name: str) -> Site:
    """Return the site of this name, or raise where its program is gone."""
    site = _sites.get(name)
    if site is None:
        raise gone(name)
    return site


def gone(name: str) -> Torch2JaxError:
    """Return the error for a site whose program is gone."""
    return Torch2JaxError(
        f"the JAX function {name} of a compiled graph is gone: it lives as long as what jax2torch "
        "returned, in the process that compiled the graph."
    )
