"""A module that asks for the values of what is traced goes through the bridge.

NOTE [Modules that ask]. A trace numbers the calls of modules in their order. Where one asks for
values (``nonzero``, ``.item()``, ``if bool(x)``), the whole trace fails, and nothing of it stays.
Then the function is traced again, and now the innermost module that was at work goes through the
bridge when its number comes, with JAX's derivatives of bridged calls. So do further modules of its
class, which saves a trace for each of them. Where PyTorch cannot tell the shapes of its results,
the module around it takes its place. Only functions that would fail pay for this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch

from ...lowerings.registry import ValuesAsked
from ..setup.changes_of_pytorch import replace_while_tracing
from ..tensors.tensor import ValueNeeded
from ..thread_state import state
from .bridge_call import NotBridged, call_on_bridge
from .events import line_of

__all__ = ["Choice", "chosen_for", "module_calls", "nothing_bridged", "retried"]

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

    def __init__(self, calls: dict[int, Question], classes: dict[type, Question]) -> None:
        self.calls, self.classes = calls, classes

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
        return Choice({**calls, number: question}, classes)


def retried(owner: Any, run: Callable[[], Result]) -> Result:
    """Return ``run()``, which traces ``owner``; see NOTE [Modules that ask]."""
    choice = Choice({}, {})
    before, events = state.choice, state.events
    noted = events and events.copy()
    for _ in range(_TRACES):
        state.choice = (owner, choice)
        try:
            return run()
        except ValuesAsked as error:
            further = choice.after(error)
            if further is None:
                raise
            choice = further
        finally:
            state.choice = before
        if events:
            events.restore(noted)
    raise AssertionError("a function calls other modules each time that it is traced")


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


class _Calls:
    """The calls of modules in one trace."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._count = 0
        self._open: list[tuple[int, torch.nn.Module]] = []

    def call(self, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        number, self._count = self._count, self._count + 1
        question = self._choice.calls.get(number)
        chosen = question is not None
        question = question or self._choice.classes.get(type(module))
        if question is not None:
            try:
                return self._through_bridge(module, args, kwargs, question)
            except NotBridged as error:
                if chosen:
                    raise self._failed(question, module, error) from error.__cause__
        self._open.append((number, module))
        try:
            return _their_call(module, *args, **kwargs)
        except ValuesAsked as error:
            if not error.calls:
                error.calls, error.line = self._under_way(), line_of(error)
            raise
        finally:
            self._open.pop()

    def _through_bridge(self, module: Any, args: Any, kwargs: Any, question: Question) -> Any:
        before, state.modules = state.modules, None
        try:
            out = call_on_bridge(module, args, kwargs)
        finally:
            state.modules = before
        if state.events is not None:
            state.events.add_module(self._name_of(module), question.what, question.line)
        return out

    def _failed(self, question: Question, module: Any, error: NotBridged) -> ValueNeeded:
        failed = ValueNeeded(
            question.what,
            f"{question.text}\n{self._name_of(module)} cannot go through the bridge: {error}",
        )
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
