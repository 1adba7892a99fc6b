"""A module that asks for the values of what is traced goes through the bridge.

NOTE [Modules that ask]. A trace numbers the calls of modules in their order. Where one asks for
values (``nonzero``, ``.item()``, ``if bool(x)``), the whole trace fails, and nothing of it stays.
Then the function is traced again, and now the innermost module that was at work goes through the
bridge when its number comes, with JAX's derivatives of bridged calls. So do further modules of its
class, which saves a trace for each of them. PyTorch tells the shapes of its results from fake
tensors. Where it cannot, the function is rehearsed up to that module, on the values of its operands
(an eager call, examples, a module's own tensors) and on made-up ones where there are none. Then the
module's operands have values to look at. Where nothing helps, the module around it takes its place.
Only functions that would fail pay for this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import torch

from ..._bridge.calls.operands import values_of
from ...lowerings.registry import ValuesAsked
from ..operators.constants import value_of
from ..setup.changes_of_pytorch import replace_while_tracing
from ..tensors.tensor import ValueNeeded
from ..thread_state import state
from .bridge_call import Known, NotBridged, call_on_bridge, operands_of
from .events import line_of
from .kept import take_out_what_was_kept

__all__ = ["Choice", "Rehearsal", "chosen_for", "module_calls", "nothing_bridged", "retried"]

Result = TypeVar("Result")

_TRACES = 500
"""At most so many traces are made of one function."""


class Question(NamedTuple):
    """A question is what asked for values, in which line, and the error's text."""

    what: str
    line: str
    text: str


class Choice:
    """A choice says which calls of modules go through the bridge."""

    def __init__(
        self,
        calls: dict[int, Question],
        classes: dict[type, Question],
        known: dict[int, Known] | None = None,
        refused: dict[int, str] | None = None,
    ) -> None:
        self.calls, self.classes = calls, classes
        self.known = known or {}
        """What is known of the operands of calls, after a rehearsal."""
        self.refused = refused or {}
        """Why calls did not go through the bridge without these values."""
        self.bridged: set[int] = set()
        """Calls that went through the bridge in the last trace."""
        self.stops: list[int] = []
        """The call at which a rehearsal ends, and those around it."""

    def after(self, error: ValuesAsked) -> Choice | None:
        """Return the choice after this error; None where no module can be chosen."""
        if not error.calls:
            return None
        number, kind = error.calls[0]
        question = Question(error.what, error.line, str(error))
        # Calls after this one were inside of it, or will have other numbers.
        calls = {n: q for n, q in self.calls.items() if n < number}
        classes = dict(self.classes)
        if kind.__module__.partition(".")[0] != "torch":  # a Sequential may hold anything
            classes[kind] = question
        known = {n: k for n, k in self.known.items() if n < number}
        refused = {n: text for n, text in self.refused.items() if n < number}
        return Choice({**calls, number: question}, classes, known, refused)

    def knowing(self, known: dict[int, Known], number: int, text: str) -> Choice:
        """Return the choice with what is known of operands, for a call that was refused."""
        refused = {**self.refused, number: text}
        return Choice(self.calls, self.classes, {**self.known, **known}, refused)


class _Rehearsed(ValuesAsked):
    """A rehearsal has come to the call whose operands it looks for."""

    def __init__(self, operands: dict[int, list[Any]]) -> None:
        super().__init__("a rehearsal", "a rehearsal ends")
        self.operands = operands


class Rehearsal(NamedTuple):
    """A rehearsal runs a function on values, which is otherwise traced."""

    run: Callable[[], Any]
    trusted: bool
    """Whether the user has given the values as examples for others."""
    other: Callable[[], Any] | None = None
    """The same run with other integers, where some are made up."""


def retried(
    owner: Any,
    run: Callable[[], Result],
    rehearsal: Callable[[], Rehearsal] | None = None,
) -> Result:
    """Return ``run()``, which traces ``owner``; see NOTE [Modules that ask].

    ``rehearsal()`` says how to rehearse it.
    """
    choice = Choice({}, {})
    before, events = state.choice, state.events
    noted = events and events.copy()
    for _ in range(_TRACES):
        state.choice = (owner, choice)
        try:
            return run()
        except ValuesAsked as error:
            further = None
            if rehearsal and isinstance(error, _Failed) and error.lacks_values:
                further = _with_values(owner, rehearsal, choice, error)
            further = further or choice.after(error)
            if further is None:
                raise
            choice = further
        finally:
            state.choice = before
            if before is None:  # after an error that goes to the caller, it is still there
                take_out_what_was_kept()
        if events:
            events.restore(noted)
    raise AssertionError("a function calls other modules each time that it is traced")


def _with_values(
    owner: Any, rehearsal: Callable[[], Rehearsal], choice: Choice, error: _Failed
) -> Choice | None:
    """Return the choice with values for the call that failed; None where there are no more."""
    if error.number in choice.refused:
        return None
    known = choice.known
    if error.number not in known:
        around = [number for number, _ in error.calls or ()]
        known = _rehearsed(owner, rehearsal(), choice, [error.number, *around])
    return choice.knowing(known, error.number, error.why) if error.number in known else None


def _rehearsed(
    owner: Any, rehearsal: Rehearsal, choice: Choice, calls: list[int]
) -> dict[int, Known]:
    """Return what a run up to a call shows of its operands, and of those of the calls around it."""
    found = _operands_in(owner, rehearsal.run, choice, calls)
    others = _operands_in(owner, rehearsal.other, choice, calls) if rehearsal.other else {}
    return {n: Known(values, rehearsal.trusted, others.get(n, ())) for n, values in found.items()}


def _operands_in(
    owner: Any, run: Callable[[], Any], choice: Choice, calls: list[int]
) -> dict[int, list[torch.Tensor | None]]:
    """Return the operands of calls in one run that ends at the first of them."""
    stops = Choice(choice.calls, choice.classes)
    stops.bridged, stops.stops = choice.bridged, calls
    take_out_what_was_kept()
    before, events = state.choice, state.events
    state.choice, state.events = (owner, stops), None
    try:
        # An outer trace may be under way, which is not to have what is computed here.
        with jax.ensure_compile_time_eval():
            run()
    except _Rehearsed as ended:
        return {n: values_of(arrays) for n, arrays in ended.operands.items()}
    except Exception:
        pass  # the trace has an error of its own
    finally:
        state.choice, state.events = before, events
        take_out_what_was_kept()
    return {}


@contextlib.contextmanager
def nothing_bridged() -> Iterator[None]:
    """In this scope a function is traced, and what would go through the bridge is an error."""
    before = state.strict, state.modules
    state.strict, state.modules = True, None
    try:
        yield
    finally:
        state.strict, state.modules = before


def chosen_for(owner: Any) -> Choice | None:
    """Return the choice with which ``retried`` traces ``owner`` now; None outside of it."""
    return state.choice[1] if state.choice and state.choice[0] is owner else None


@contextlib.contextmanager
def module_calls(owner: Any, choice: Choice | None = None) -> Iterator[None]:
    """In this scope ``owner`` is traced, outside of ``retried`` with this choice."""
    chosen = chosen_for(owner)
    before, state.modules = state.modules, _Calls(chosen or choice or Choice({}, {}))
    try:
        yield
    except ValuesAsked as error:
        if chosen is None:  # whoever traces what is around this has other numbers
            error.calls = None
        raise
    finally:
        state.modules = before


class _Failed(ValueNeeded):
    """A module was chosen that cannot go through the bridge."""

    number = -1
    """The number of its call."""
    why = ""
    lacks_values = False
    """Whether it might go with the values of its operands."""


class _Calls:
    """The calls of modules in one trace."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._count = 0
        self._operands: dict[int, list[Any]] = {}
        if not choice.stops:
            choice.bridged = set()
        self._open: list[tuple[int, torch.nn.Module]] = []

    def call(self, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        number, self._count = self._count, self._count + 1
        question = self._choice.calls.get(number)
        if self._choice.stops:
            return self._rehearsed(number, module, args, kwargs)
        chosen = question is not None
        question = question or self._choice.classes.get(type(module))
        if question is not None:
            try:
                out = self._through_bridge(number, module, args, kwargs, question)
            except NotBridged as error:
                if chosen:
                    raise self._failed(number, question, module, error) from error.__cause__
            else:
                self._choice.bridged.add(number)
                return out
        self._open.append((number, module))
        try:
            return _their_call(module, *args, **kwargs)
        except ValuesAsked as error:
            if not error.calls:
                error.calls, error.line = self._under_way(), line_of(error)
            raise
        finally:
            self._open.pop()

    def _rehearsed(self, number: int, module: Any, args: Any, kwargs: Any) -> Any:
        if number in self._choice.stops:
            tensors = operands_of(module, args, kwargs).tensors
            self._operands[number] = [value_of(x) for x in tensors]
            if number == self._choice.stops[0]:
                raise _Rehearsed(self._operands)
        before = state.modules
        if number in self._choice.bridged:  # what it calls had no numbers
            state.modules = None
        try:
            return _their_call(module, *args, **kwargs)
        finally:
            state.modules = before

    def _through_bridge(
        self, number: int, module: Any, args: Any, kwargs: Any, question: Question
    ) -> Any:
        known = self._choice.known.get(number) if number in self._choice.refused else None
        before, state.modules = state.modules, None
        try:
            out = call_on_bridge(module, args, kwargs, known)
        finally:
            state.modules = before
        if state.events is not None:
            state.events.add_module(self._name_of(module), question.what, question.line)
        return out

    def _failed(self, number: int, question: Question, module: Any, error: NotBridged) -> _Failed:
        why = self._choice.refused.get(number, str(error))
        failed = _Failed(
            question.what,
            f"{question.text}\n{self._name_of(module)} cannot go through the bridge: {why}",
        )
        failed.why = why
        failed.number, failed.lacks_values = number, error.lacks_values
        failed.calls, failed.line = self._under_way(), question.line
        return failed

    def _under_way(self) -> list[tuple[int, type]]:
        return [(number, type(module)) for number, module in reversed(self._open)]

    def _name_of(self, module: torch.nn.Module) -> str:
        outermost = self._open[0][1] if self._open else module
        paths = (path for path, sub in outermost.named_modules() if sub is module)
        path = next(paths, "")
        return f"{path} ({type(module).__qualname__})" if path else type(module).__qualname__


_their_call: Any = torch.nn.Module.__call__


def _call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    if state.modules is None:
        return _their_call(self, *args, **kwargs)
    return state.modules.call(self, args, kwargs)


replace_while_tracing(torch.nn.Module, "__call__", _call)
