"""What a function returns, found on stand-ins for its arguments. Imports torch, never JAX.

``fn`` runs on fake tensors (shapes and dtypes, no values). Where fake tensors cannot run it
(``.item()``, ``.numpy()``), it runs on the example values, or on seeded random normals: zeros break
``cholesky``, ``inv`` and norms. Either way the user's objects are as before: see ``preserved`` and
``Recorder.restoring``.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import disable_saved_tensors_hooks

from . import ambient
from .integers import IntegerUse
from .reachable import preserved
from .recorder import Recorder


@dataclass(frozen=True)
class Spec:
    """Shape, dtype and device of an operand; the value of an example, if there is one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    value: torch.Tensor | None = None


@dataclass(frozen=True)
class Inference:
    """What one run of a function showed."""

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
    """A fake tensor outlived inference: something outside the function's modules keeps it."""


class ShapeDependsOnValues(Exception):
    """The shape of a result depends on values, which are not known when a call is traced."""


def infer(
    fn: Callable[..., Any],
    specs: Sequence[Spec],
    describe: Callable[[Any], Any],
    default_dtype: torch.dtype,
    roots: Iterable[Any],
    integers: IntegerUse,
) -> Inference:
    """Run ``fn`` on stand-ins for operands of ``specs``; ``describe`` maps its result.

    ``integers`` learns what becomes of int32 operands, also where an exception ends the run.

    Raises ``FakeSurvived``, ``ShapeDependsOnValues``, or the exception of ``fn`` itself.
    """
    with ambient.clean_surroundings(default_dtype), preserved(roots):
        try:
            recorder, found = _infer_fake(fn, specs, describe, integers)
        except _Refused as refused:
            raise refused.error from None
        except Exception as error:
            return _infer_otherwise(fn, specs, describe, integers, error)
    if recorder.any_alive():
        raise FakeSurvived
    return found


def _infer_otherwise(
    fn: Callable[..., Any],
    specs: Sequence[Spec],
    describe: Callable[[Any], Any],
    integers: IntegerUse,
    fake_error: Exception,
) -> Inference:
    """Run on symbols for sizes that depend on values, or on values: fake tensors did not do."""
    try:
        if type(fake_error).__name__ == "DynamicOutputShapeException":
            with contextlib.suppress(_NoSymbols):
                return _infer_symbolic(fn, specs, describe, integers)
        return _infer_real(fn, specs, describe, integers)
    except _Refused as refused:
        raise refused.error from None
    except Exception as error:
        if type(error) is not type(fake_error) and any(s.value is None for s in specs):
            reason = str(fake_error).strip().partition("\n")[0]
            error.add_note(
                "It ran on random values, because fake tensors could not tell its result "
                f"({type(fake_error).__name__}: {reason}). Example values for "
                "torch2jax(fn, *examples) or output_shapes= take their place."
            )
        raise error from None


class _Refused(Exception):
    """``describe`` refused the result: running again with values would not help."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _infer_fake(
    fn: Callable[..., Any],
    specs: Sequence[Spec],
    describe: Callable[[Any], Any],
    integers: IntegerUse,
) -> tuple[Recorder, Inference]:
    with _fake_tensors():
        operands = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in specs]
        recorder = Recorder(operands, integers)
        return recorder, _record(fn, operands, recorder, describe)


@contextlib.contextmanager
def _fake_tensors(**options: Any) -> Iterator[None]:
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


class _NoSymbols(Exception):
    """Symbolic sizes did not carry through the function."""


def _infer_symbolic(
    fn: Callable[..., Any],
    specs: Sequence[Spec],
    describe: Callable[[Any], Any],
    integers: IntegerUse,
) -> Inference:
    """Run with a symbol for a size that depends on values; it shows in the result."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with _fake_tensors(shape_env=ShapeEnv()):
        operands = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in specs]
        try:
            return _record(fn, operands, Recorder(operands, integers), describe)
        except _Refused:
            raise
        except Exception as error:
            raise _NoSymbols from error


def _infer_real(
    fn: Callable[..., Any],
    specs: Sequence[Spec],
    describe: Callable[[Any], Any],
    integers: IntegerUse,
) -> Inference:
    def run(**others: int) -> Inference:
        operands = [_sample(i, s, **others) for i, s in enumerate(specs)]
        return _record(fn, operands, Recorder(operands, integers), describe)

    found = run()
    if any(s.value is None and not _inexact(s.dtype) for s in specs):
        # It runs on other integers too: a shape that follows them is not known.
        again = None
        with contextlib.suppress(Exception):  # an index beyond its end, say
            again = run(integer=1)
        if again is not None and again.result != found.result:
            raise ShapeDependsOnValues
    return found


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
            raise _Refused(error) from None
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
    """None if ``run`` runs on fake tensors; else why not, with the operator where it stopped."""
    recorder = None
    with ambient.clean_surroundings(default_dtype), preserved(roots), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of slow batching rules: no refusal
        try:
            with _fake_tensors():
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


def _sample(index: int, spec: Spec, integer: int = 0) -> torch.Tensor:
    if spec.value is not None:
        return spec.value.detach().to(spec.device, spec.dtype, copy=True)
    generator = torch.Generator().manual_seed(index)
    if spec.dtype.is_floating_point and spec.dtype.itemsize > 1:
        value = torch.randn(spec.shape, generator=generator, dtype=torch.float32)
    elif spec.dtype.is_complex:
        value = torch.randn(spec.shape, generator=generator, dtype=torch.complex64)
    else:
        value = torch.full(spec.shape, float(integer))
    return value.to(spec.device, spec.dtype)
