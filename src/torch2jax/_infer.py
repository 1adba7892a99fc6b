"""What a function returns, found on stand-ins for its arguments: torch only, never JAX.

``fn`` runs on fake tensors (shapes and dtypes, no values). Where fake tensors cannot run it
(``.item()``, ``.numpy()``), it runs on the example values, or on seeded random normals: zeros break
``cholesky``, ``inv`` and norms. Either way the user's objects are as before: see ``preserved`` and
``_Recorder.restoring``.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from . import _state
from ._reach import preserved

_NATIVE_NAMESPACES = ("aten", "prims", "prim", "c10d", "profiler")


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
    refuses_int32: str | None = None
    """An operator whose kernel wants int64 where it got int32."""


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
) -> Inference:
    """Run ``fn`` on stand-ins for operands of ``specs``; ``describe`` maps its result.

    Raises ``FakeSurvived``, ``ShapeDependsOnValues``, or the exception of ``fn`` itself.
    """
    with _state.clean(default_dtype), preserved(roots):
        try:
            recorder, found = _infer_fake(fn, specs, describe)
        except _Refused as refused:
            raise refused.error from None
        except Exception as error:
            return _infer_otherwise(fn, specs, describe, error)
    if recorder.any_alive():
        raise FakeSurvived
    return found


def _infer_otherwise(
    fn: Callable[..., Any],
    specs: Sequence[Spec],
    describe: Callable[[Any], Any],
    fake_error: Exception,
) -> Inference:
    """What fake tensors could not tell: with symbols for sizes that depend on values, or values."""
    try:
        if type(fake_error).__name__ == "DynamicOutputShapeException":
            with contextlib.suppress(_NoSymbols):
                return _infer_symbolic(fn, specs, describe)
        return _infer_real(fn, specs, describe)
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
    fn: Callable[..., Any], specs: Sequence[Spec], describe: Callable[[Any], Any]
) -> tuple[_Recorder, Inference]:
    with _fake_tensors():
        operands = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in specs]
        recorder = _Recorder(operands, probe_int32=any(s.dtype is torch.int32 for s in specs))
        return recorder, _record(fn, operands, recorder, describe)


@contextlib.contextmanager
def _fake_tensors(**options: Any) -> Iterator[None]:
    """Every new tensor is fake. What an operator refuses is raised, and not logged beside."""
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
    fn: Callable[..., Any], specs: Sequence[Spec], describe: Callable[[Any], Any]
) -> Inference:
    """An operator's size depends on values: a symbol stands for it, and shows in the result."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with _fake_tensors(shape_env=ShapeEnv()):
        operands = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in specs]
        try:
            return _record(fn, operands, _Recorder(operands), describe)
        except _Refused:
            raise
        except Exception as error:
            raise _NoSymbols from error


def _infer_real(
    fn: Callable[..., Any], specs: Sequence[Spec], describe: Callable[[Any], Any]
) -> Inference:
    def run(**others: int) -> Inference:
        operands = [_sample(i, s, **others) for i, s in enumerate(specs)]
        return _record(fn, operands, _Recorder(operands), describe)

    found = run()
    if any(s.value is None and not _inexact(s.dtype) for s in specs):
        # Other integers, too: a shape that follows them is not known.
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
    recorder: _Recorder,
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
            recorder.refuses_int32,
        )


def runs_on_fakes(
    run: Callable[..., Any],
    specs: Sequence[Spec],
    default_dtype: torch.dtype,
    roots: Iterable[Any],
) -> str | None:
    """None if ``run`` runs on fake tensors; else why not, with the operator where it stopped."""
    recorder = None
    with _state.clean(default_dtype), preserved(roots), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of slow batching rules: no refusal
        try:
            with _fake_tensors():
                operands = [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in specs]
                recorder = _Recorder(operands)
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


class _Recorder(TorchDispatchMode):
    """Sees every operator of a run: which draw, which are a library's own, what they write."""

    def __init__(self, operands: Sequence[torch.Tensor], probe_int32: bool = False) -> None:
        super().__init__()
        self.last: str | None = None
        self.draws: str | None = None
        self.no_forward = False
        self.refuses_int32: str | None = None
        self.written: set[int] = set()
        """Operands written, whatever their version counters say: ``_foreach`` moves none."""
        self._operands = {x.untyped_storage()._cdata: i for i, x in enumerate(operands)}
        self._created: set[int] = set()
        self._outside: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._generators: list[tuple[torch.Generator, torch.Tensor]] = []
        self._probed: set[Any] | None = set() if probe_int32 else None
        self._results: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "prim":  # queries of a device or a layout
            self.last = str(func)
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func._schema, args, kwargs):
            self.draws = self.draws or str(func)
            generator = kwargs.get("generator")
            if generator is not None:
                self._generators.append((generator, generator.get_state()))
        if func.namespace not in _NATIVE_NAMESPACES or _pushes_wrong(func, args, kwargs):
            self.no_forward = True
        if func._schema.is_mutable or func._schema.name in _STATISTICS_WRITERS:
            self._note_writes(func._schema, args, kwargs)
        if self._probed is not None:
            self._probe_int32(func, args, kwargs)
        out = func(*args, **kwargs)
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
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
                    # Of the user's own: on fake operands, too, such a write is done.
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

    def _probe_int32(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find operators that take int32 on fake tensors and refuse it on real ones.

        The shape formulas of ``gather`` or ``nll_loss`` do not look at the index's dtype; the
        kernels do. Each such operator runs once on zeros without memory of their own.
        """
        assert self._probed is not None
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        key = (func, *(t.dtype for t in tensors))
        if key in self._probed or not any(t.dtype is torch.int32 for t in tensors):
            return
        self._probed.add(key)

        def zeros(t: Any) -> Any:
            if not isinstance(t, torch.Tensor):
                return t
            flat = torch.zeros((), dtype=t.dtype, device=t.device).expand(t.shape)
            return flat.clone() if func._schema.is_mutable else flat

        with _disable_current_modes():
            try:
                func(*tree_map(zeros, args), **tree_map(zeros, kwargs))
            except Exception as error:
                if re.search(r"\b(Long|int64|LongTensor)\b", str(error)):
                    self.refuses_int32 = self.refuses_int32 or f"{func}: {error}"

    def any_alive(self) -> bool:
        if any(r() is not None for r in self._results):
            gc.collect()
        return any(r() is not None for r in self._results)


def _pushes_wrong(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether torch's forward mode is silently wrong where its reverse mode is right.

    Products of ``scatter_reduce`` have a tangent of zero. The others take a tangent for symmetric
    or triangular, as they take the operand, and read of it what reverse mode leaves out.
    """
    name = func._schema.name
    if name in ("aten::scatter_reduce", "aten::scatter_reduce_"):
        return "prod" in (*args[4:], *kwargs.values())
    return name in ("aten::linalg_cholesky_ex", "aten::_linalg_eigh", "aten::triangular_solve")


def _writes_statistics(schema: Any, argument: str, args: tuple[Any, ...]) -> bool:
    """Whether an argument is among the statistics that some normalisations write undeclared."""
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
"""Where their argument ``training`` stands; None: they always write."""


def _draws(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator that can draw random numbers does: a dropout of zero draws none."""
    given = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
    if "bernoulli" in schema.name:
        return True
    if any(given.get(name) is False for name in ("train", "training")):
        return False
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    chances = [{**defaults, **given}.get(name) for name in ("dropout_p", "dropout", "p")]
    return not any(isinstance(p, int | float) and p == 0 for p in chances)


_REAL = (torch.Tensor, torch.nn.Parameter)


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
