"""What a function returns is inferred on stand-ins for its arguments.

This file imports torch, never JAX. ``fn`` runs on fake tensors, which have shapes and dtypes
and no values; or, until these are loaded, on stand-ins, where they will do: see ``standins``.
Where it needs values (``.item()``, ``.numpy()``, ``if x.any()``), these runs are
tried in turn:

1. on the values of the operands, where all are known: an eager call has them, and examples do;
2. on fake tensors again, with every question about values answered both ways: see ``answers``;
3. on made-up values: zeros for integers, and seeded normals for floats, since zeros break
   ``cholesky``, ``inv`` and norms. Another run on ones must have a result of the same shape. It may
   raise, unless zeros have made a result without elements.

No run leaves anything behind in the user's objects: see ``preserving`` and ``Recorder.restoring``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import disable_saved_tensors_hooks

from ..._compat.torch import answering_shapes
from . import ambient
from .answers import (
    Branch,
    NoAnswerEnds,
    ReadIntegers,
    Refused,
    ShapeDependsOnAnswers,
    asked_in,
    explored,
)
from .exceptions import clear_frames
from .integers import IntegerUse
from .preserving import preserved, take_out
from .recorder import Recorder
from .standins import RecorderOfStandins, StandinMode, fakes_are_loaded, standin_for


@dataclass(frozen=True)
class Spec:
    """A Spec is an operand's shape, dtype and device, and its value or an example's, if known."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    value: torch.Tensor | None = None
    example: bool = True
    """Whether the value is an example's, rather than that of the call which is traced."""
    other: torch.Tensor | None = None
    """The value with other integers, where it follows made-up ones."""


@dataclass(frozen=True)
class Inference:
    """An Inference is what one run of a function showed."""

    result: Any
    """What ``fn`` returned, mapped by ``describe``."""
    mutated: frozenset[int] = frozenset()
    """Operands that it changed in place."""
    forward_ad: bool = True
    """False where it calls an operator whose forward-mode formula may be missing, or is wrong."""
    draws: str | None = None
    """An operator that draws random numbers."""
    sparse_gradients: bool = False
    """Whether embeddings ask for sparse gradients."""
    differentiates: bool = False
    """Whether it asks for gradients itself, as a user of PyTorch has them on."""


class FakeSurvived(Exception):
    """Something keeps a tensor of the run that inferred, and does not let it go."""


class ShapeDependsOnValues(Exception):
    """The shape of a result depends on values, which are not known when a call is traced."""


class ValuesNeeded(Exception):
    """Fake tensors cannot run the function, and whoever calls may know the operands' values."""


def infer(
    fn: Callable[..., Any],
    specs: Sequence[Spec],
    describe: Callable[[Any], Any],
    default_dtype: torch.dtype,
    roots: Iterable[Any],
    integers: IntegerUse,
    guess: bool = True,
) -> Inference:
    """Run ``fn`` on stand-ins for operands of ``specs``; ``describe`` maps its result.

    ``integers`` learns what becomes of int32 operands, also where an exception ends the run.

    It raises ``FakeSurvived``, ``ShapeDependsOnValues``, or the exception of ``fn`` itself. Without
    ``guess`` it raises ``ValuesNeeded`` where a guess would be next.
    """
    trial = _Trial(fn, specs, describe, default_dtype, tuple(roots), integers)
    if not fakes_are_loaded():
        found = trial.on_standins()
        if found is not None:
            return found
    try:
        try:
            return trial.on_fakes()
        except (Refused, FakeSurvived):
            raise
        except Exception as error:
            if type(error).__name__ == "DynamicOutputShapeException":
                with contextlib.suppress(_NoSymbols):
                    return trial.on_symbols()
            if any(s.value is None for s in specs):
                if not guess:
                    raise ValuesNeeded from None
                return _guessed(trial, error)
            return trial.on_values()
    except Refused as refused:
        raise refused.error from None


def _guessed(trial: _Trial, fake_error: Exception) -> Inference:
    question = asked_in(fake_error)
    try:
        try:
            return explored(trial.on_answers)
        except NoAnswerEnds as ended:
            if ended.needs_symbols:
                with contextlib.suppress(NoAnswerEnds):
                    return explored(functools.partial(trial.on_answers, symbols=True))
    except ShapeDependsOnAnswers:
        raise ShapeDependsOnValues from None
    try:
        return trial.on_values()
    except (Refused, FakeSurvived, ShapeDependsOnValues):
        raise
    except Exception as error:
        if question is None:
            if type(error) is not type(fake_error):
                reason = str(fake_error).strip().partition("\n")[0]
                error.add_note(
                    "It ran on made-up values, because fake tensors could not tell its result "
                    f"({type(fake_error).__name__}: {reason}). Example values for "
                    "torch2jax(fn, *examples) or output_shapes= take their place."
                )
            raise error from None
        raise NotInferred(question, error) from error


class NotInferred(Exception):
    """``fn`` asks for values that are not known, and on made-up values it raised ``error``."""

    def __init__(self, question: str, error: Exception) -> None:
        self.question, self.error = question, error


class _NoSymbols(Exception):
    """Symbolic sizes did not carry through the function."""


@dataclass(frozen=True)
class _Trial:
    """A trial is a function with the ways to run it."""

    fn: Callable[..., Any]
    specs: Sequence[Spec]
    describe: Callable[[Any], Any]
    default_dtype: torch.dtype
    roots: tuple[Any, ...]
    integers: IntegerUse

    def on_standins(self) -> Inference | None:
        """Run on stand-ins, which take no time to load; None where they do not carry through."""
        if any(s.device.type != "cpu" for s in self.specs):
            return None
        mode = StandinMode()
        try:
            found = self._run(
                mode,
                lambda operands: RecorderOfStandins(operands, self.integers),
                lambda _, s: standin_for(s.shape, s.dtype),
            )
        except Exception:
            return None  # whatever it was, the run on fake tensors meets and raises it
        return None if mode.given_up or fakes_are_loaded() else found

    def on_fakes(self) -> Inference:
        return self._run(fake_tensors(), self._recorder)

    def on_symbols(self) -> Inference:
        """Run with a symbol for each size that depends on values; it shows in the result."""
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        try:
            return self._run(fake_tensors(shape_env=ShapeEnv()), self._recorder)
        except (Refused, FakeSurvived):
            raise
        except Exception as error:
            raise _NoSymbols from error

    def on_answers(self, branch: Branch, symbols: bool = False) -> Inference:
        """Run on fake tensors, with the answers of one branch to questions about values.

        With ``symbols`` sizes that depend on values may come up, and questions about them too.
        """
        sizes = {"shape_env": answering_shapes(branch.answer)} if symbols else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of answers, which need not be true
            return self._run(fake_tensors(**sizes), lambda xs: self._recorder(xs, branch.call))

    def on_values(self) -> Inference:
        """Run on the values of the operands, and on made-up ones where they are not known."""

        def run(integer: int = 0, read: ReadIntegers | None = None) -> Inference:
            def record(operands: list[torch.Tensor]) -> Recorder:
                if read is None:
                    return self._recorder(operands)
                read.of(operands)
                return self._recorder(operands, read.call)

            sample = functools.partial(sample_of, integer=integer)
            return self._run(contextlib.nullcontext(), record, sample)

        # A second run has other integers: a shape that follows them is not known. The user's
        # examples need no such run.
        made_up = any(
            s.other is not None or (s.value is None and not _inexact(s.dtype)) for s in self.specs
        )
        read = None if made_up or all(s.example for s in self.specs) else ReadIntegers()
        found = run(read=read)
        again = None
        try:
            if made_up:
                again = run(integer=1)
            elif read is not None and read.any:
                again = run(read=ReadIntegers(more=1))
        except Exception:  # an index may lie beyond its end
            # A mask of zeros selects nothing, which says nothing of how much another selects.
            if made_up and _is_empty(found.result):
                raise
        if again is not None and again.result != found.result:
            raise ShapeDependsOnValues
        return found

    def _recorder(
        self, operands: list[torch.Tensor], call: Callable[..., Any] | None = None
    ) -> Recorder:
        return Recorder(operands, self.integers, call)

    def _run(
        self,
        mode: Any,
        recording: Callable[[list[torch.Tensor]], Recorder],
        sample: Callable[[int, Spec], torch.Tensor] | None = None,
    ) -> Inference:
        """Run once. What the run leaves in caches is taken out of them, on errors too."""
        recorder, handled = None, sys.exc_info()[1]
        try:
            with ambient.clean_surroundings(self.default_dtype), preserved(self.roots), mode:
                operands = [
                    sample(i, s) if sample else torch.empty(s.shape, dtype=s.dtype, device=s.device)
                    for i, s in enumerate(self.specs)
                ]
                recorder = recording(operands)
                found = _record(self.fn, operands, recorder, self.describe)
            del operands
        except Exception as error:
            clear_frames(error, handled)
            if recorder is not None and (alive := recorder.alive()):
                take_out(alive)
            raise
        if alive := recorder.alive():
            take_out(alive)
            del alive
            if recorder.alive():
                raise FakeSurvived
        return found


@contextlib.contextmanager
def fake_tensors(**options: Any) -> Iterator[None]:
    """Make every new tensor fake. What an operator refuses is raised, and not logged as well."""
    # Loading fake tensors takes most of a second.
    from torch._subclasses.fake_tensor import FakeTensorMode

    thread = threading.get_ident()
    logger = logging.getLogger("torch._subclasses.fake_tensor")

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(of_others)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True, **options):
            yield
    finally:
        logger.removeFilter(of_others)


def _is_empty(result: Any) -> bool:
    """Return whether a tensor of a described result has no elements."""
    return any(0 in leaf.shape for leaf in result.leaves)


def _inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _record(
    fn: Callable[..., Any],
    operands: list[torch.Tensor],
    recorder: Recorder,
    describe: Callable[[Any], Any],
) -> Inference:
    before = [x._version for x in operands]
    with recorder.restoring():
        with recorder:
            out = fn(*operands)
        try:
            result = describe(out)
        except Exception as error:
            raise Refused(error) from None
        changed = {i for i, x in enumerate(operands) if x._version != before[i]}
        return Inference(
            result,
            frozenset(changed | recorder.written),
            not recorder.no_forward,
            recorder.draws,
            recorder.sparse_gradients,
        )


def runs_on_fakes(
    run: Callable[..., Any],
    specs: Sequence[Spec],
    default_dtype: torch.dtype,
    roots: Iterable[Any],
) -> str | None:
    """Return None if ``run`` runs on fake tensors, else why not and after which operator."""
    recorder = None
    with ambient.clean_surroundings(default_dtype), preserved(roots), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of slow batching rules, which refuse nothing
        try:
            with fake_tensors():
                operands = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in specs]
                recorder = Recorder(operands)
                # Gradients are on so that a checkpoint, which vmap cannot run again, shows itself.
                refused = disable_saved_tensors_hooks(_HOOKS_REFUSED)
                with recorder.restoring(), recorder, torch.enable_grad(), refused:
                    run(*operands)
            return None
        except Exception as error:
            at = f" (after {recorder.last})" if recorder and recorder.last else ""
            reason = str(error).strip().splitlines()
            return f"{type(error).__name__}: {reason[0] if reason else ''}{at}"


_HOOKS_REFUSED = "it hooks saved tensors (torch.utils.checkpoint does), which a batch cannot have"


def sample_of(index: int, spec: Spec, integer: int = 0) -> torch.Tensor:
    """Return the value of an operand, or a made-up one."""
    known = spec.value if spec.other is None or integer == 0 else spec.other
    if known is not None:
        return known.detach().to(spec.device, spec.dtype, copy=True)
    generator = torch.Generator().manual_seed(index)
    if spec.dtype.is_floating_point and spec.dtype.itemsize > 1:
        value = torch.randn(spec.shape, generator=generator, dtype=torch.float32)
    elif spec.dtype.is_complex:
        value = torch.randn(spec.shape, generator=generator, dtype=torch.complex64)
    else:
        value = torch.full(spec.shape, float(integer))
    return value.to(spec.device, spec.dtype)
