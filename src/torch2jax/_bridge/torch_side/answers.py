"""Questions about unknown values are answered both ways. This file imports torch, never JAX.

NOTE [Both answers]. A function that is traced may ask for values: ``if x.any()``, ``.item()``,
``assert (x > 0).all()``. Fake tensors have none, so it is run once for each of several answers. The
same place in the code gets the same answers in every run: the first time yes, later no, so that a
loop ends after a step. Where that raises, the last place that can answer otherwise does so. A run
that raises drops out, so an ``assert`` answers yes. From the first run that ends, each place
answers otherwise in turn. All runs that end must agree on the result; where they do not, its shape
depends on the values. What does not depend on the operands is computed, because it has values.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

Tensor = torch.Tensor

_RUNS = 24
"""At most so many runs are made."""
_OPERATORS = 50_000
"""A run that calls more operators has met a loop that no answer ends."""


class Refused(Exception):
    """A run ended with a result that is refused: further runs would not help."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class NoAnswerEnds(Exception):
    """Whatever is answered, the function raises; or it asks nothing.

    ``needs_symbols`` says that it met a size that depends on values.
    """

    def __init__(self, needs_symbols: bool = False) -> None:
        self.needs_symbols = needs_symbols


class ShapeDependsOnAnswers(Exception):
    """Two runs ended with different results."""


class Branch:
    """A branch is one run and its answers: ``forced`` at some places, by default at the others."""

    def __init__(self, forced: dict[Hashable, Any], operators: int = _OPERATORS) -> None:
        self.forced = forced
        self.operators = 0
        self.needs_symbols = False
        self._limit = operators
        self.asked: dict[Hashable, tuple[Any, ...]] = {}
        """Places in the order in which they asked last, and what can be answered."""
        self.given: dict[Hashable, list[Any]] = {}
        self._written: dict[int, Any] = {}
        """Written storages by address; they are kept, so that no other one gets the address."""

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operator: on values where it has them, else on fake tensors."""
        self.operators += 1
        if self.operators > self._limit:
            raise NoAnswerEnds
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        sized = not any(isinstance(x, torch.SymInt) for x in leaves)
        if sized and all(map(self._known, tensors)):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if torch.Tag.data_dependent_output in func.tags and str(_returns(func)) in _ANSWERED:
            return self.answer(self._options(func, tensors[0]))
        if func._schema.is_mutable:
            # A known tensor that gets unknown values is not known from here on.
            self._written.update(_storage(t) for t in tensors if type(t) in _REAL)
        try:
            return func(*args, **kwargs)
        except Exception as error:
            self.needs_symbols |= type(error).__name__ == "DynamicOutputShapeException"
            raise

    def _known(self, t: Tensor) -> bool:
        return type(t) in _REAL and _storage(t)[0] not in self._written

    def _options(self, func: Any, x: Tensor) -> tuple[Any, ...]:
        if str(_returns(func)) == "bool" or x.dtype is torch.bool:
            return (True, False)
        return (1.0, 0.0) if x.dtype.is_floating_point or x.dtype.is_complex else (1, 0, 2)

    def answer(self, options: tuple[Any, ...] = (True, False)) -> Any:
        """Answer a question that the user's code asks now."""
        frame = _users_frame(sys._getframe(1))
        place = (frame.f_code, frame.f_lasti) if frame else None
        answer = self.forced.get(place, options[place in self.asked])
        self.asked[place] = self.asked.pop(place, options)  # this place is now the last one
        self.given.setdefault(place, []).append(answer)
        return answer


_ANSWERED = ("bool", "Scalar", "number")


def _returns(func: Any) -> Any:
    returns = func._schema.returns
    return returns[0].type if len(returns) == 1 else None


_REAL = (torch.Tensor, torch.nn.Parameter)


def _storage(t: Tensor) -> tuple[int, Any]:
    if t.layout is not torch.strided:
        return 0, None
    storage = t.untyped_storage()
    return storage._cdata, storage


class ReadIntegers:
    """``ReadIntegers`` watches whether a run on values reads integers that depend on the operands.

    The run reads each of them ``more`` too large. A shape that follows them then differs from that
    of a run on the values themselves.
    """

    def __init__(self, more: int = 0) -> None:
        self.any = False
        self._more = more
        self._dependent: Any = WeakIdKeyDictionary()

    def of(self, operands: Iterable[Tensor]) -> None:
        """Note that these tensors depend on the operands."""
        for x in operands:
            self._dependent[x] = True

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operator."""
        out = func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x in self._dependent for x in given):
            if func._schema.name == "aten::_local_scalar_dense" and type(out) is int:
                self.any = True
                return out + self._more
            self.of(x for x in tree_leaves(out) if isinstance(x, Tensor))
            if func._schema.is_mutable:
                self.of(given)
        return out


def explored(run: Callable[[Branch], Any]) -> Any:
    """Return what those runs show that end; see NOTE [Both answers]."""
    left = _RUNS
    forced: dict[Hashable, Any] = {}
    tried: dict[Hashable, list[Any]] = {}
    while True:
        branch = Branch(dict(forced))
        left -= 1
        try:
            found = run(branch)
            break
        except Refused:
            raise
        except Exception as error:
            if not left or not _otherwise(branch, forced, tried):
                raise NoAnswerEnds(branch.needs_symbols) from error
    limit = 2 * branch.operators + 1000
    for place, options in branch.asked.items():
        first = forced.get(place, options[0])
        for answer in options:
            if answer == first or answer in tried.get(place, ()) or not left:
                continue
            left -= 1
            try:
                other = run(Branch({**forced, place: answer}, limit))
            except Refused:
                raise
            except Exception:
                continue
            found = _agreed(found, other)
    return found


def _otherwise(
    branch: Branch, forced: dict[Hashable, Any], tried: dict[Hashable, list[Any]]
) -> bool:
    """Let the last place that can do so answer otherwise than in a run that raised."""
    later: list[Hashable] = []
    for place, options in reversed(branch.asked.items()):
        given = branch.given[place]
        known = tried.setdefault(place, [])
        if len(set(given)) == 1:
            known.append(given[0])
        untried = sorted((o for o in options if o not in known), key=lambda o: o == given[-1])
        if untried:
            forced[place] = untried[0]
            for x in later:
                forced.pop(x, None)
                tried.pop(x, None)
            return True
        later.append(place)
    return False


def _agreed(a: Any, b: Any) -> Any:
    if a.result != b.result:
        raise ShapeDependsOnAnswers
    return replace(
        a,
        mutated=a.mutated | b.mutated,
        forward_ad=a.forward_ad and b.forward_ad,
        draws=a.draws or b.draws,
        sparse_gradients=a.sparse_gradients or b.sparse_gradients,
        differentiates=a.differentiates or b.differentiates,
    )


# --- where a function asks -----------------------------------------------------------------------


def asked_in(error: BaseException) -> str | None:
    """Say in which line fake tensors were asked for values; None where the error is another."""
    if type(error).__name__ not in _ASKING and not _OF_FAKES.search(str(error)):
        return None
    return users_line(error) or str(error).strip().partition("\n")[0]


def users_line(error: BaseException) -> str | None:
    """Return the innermost line of the user's code from which an error came, if there is one."""
    found = None
    traceback = error.__traceback__
    while traceback is not None:
        if _is_users(traceback.tb_frame):
            found = traceback
        traceback = traceback.tb_next
    return None if found is None else _quoted(found.tb_frame, found.tb_lineno)


def line_of_the_user(frame: FrameType | None) -> str | None:
    """Return the line of the user's code that runs now, under ``frame``, if there is one."""
    found = _users_frame(frame)
    return None if found is None else _quoted(found, found.f_lineno)


def _quoted(frame: FrameType, line: int) -> str:
    file = frame.f_code.co_filename
    source = linecache.getline(file, line).strip()
    return f"{os.path.basename(file)}, line {line}" + (f": `{source}`" if source else "")


_ASKING = ("DataDependentOutputException", "DynamicOutputShapeException")
_OF_FAKES = re.compile(r"numpy|tolist|fake|data pointer", re.IGNORECASE)

_NOT_THE_USERS = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep
    for file in (torch.__file__, os.path.join(__file__, *[os.pardir] * 2))
)


def _is_users(frame: FrameType) -> bool:
    return not frame.f_code.co_filename.startswith(_NOT_THE_USERS)


def _users_frame(frame: FrameType | None) -> FrameType | None:
    while frame is not None and not _is_users(frame):
        frame = frame.f_back
    return frame
