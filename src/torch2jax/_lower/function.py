"""With ``torch2jax(fn, lower=True)`` ``fn`` runs once, on tensors that hold tracers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch
from jax.core import Tracer
from torch.utils import _pytree as torch_tree

from .._bridge.calls import results
from .._bridge.calls.arguments import Arguments, Casts
from .._bridge.calls.attempts import widened
from .._bridge.calls.function import TorchFunction
from .._bridge.calls.operands import OperandOptions, is_unknown
from .._bridge.calls.options import Options
from .._bridge.calls.results import flatten_result
from .._bridge.calls.shards import Shards
from .._bridge.torch_side.gradients import needs_gradients
from .._bridge.torch_side.inference import Spec, sample_of
from .._bridge.torch_side.modules import loans
from .._bridge.torch_side.modules.forward import Forward
from .._bridge.torch_side.modules.replica import Layout
from .._bridge.torch_side.preserving import restored_after
from .._conversions.dtypes import canonical, dtype_j2t
from .._conversions.float64 import admit, is_carried
from .._conversions.narrowed import NARROWED
from .._errors import SignatureError, Torch2JaxError
from .._progress import telling
from .._refusals import refuse_symbolic
from ..device.operators.constants import value_of
from ..device.setup.enable import enable
from ..device.tensors.tensor import Tensor, from_torch, wrap
from ..device.tracing import hooks
from ..device.tracing.bridged_modules import (
    Rehearsal,
    module_calls,
    nothing_bridged,
    retried,
)
from ..device.tracing.kept import nothing_kept
from ..device.tracing.scope import running
from ..lowerings.registry import ValuesAsked

__all__ = ["LoweredFunction"]


class LoweredFunction(TorchFunction):
    """This is a PyTorch function as a JAX program; ``torch2jax(fn, lower=True)`` makes it."""

    _traced_again = (ValuesAsked,)

    def __init__(
        self, fn: Callable[..., Any], run: Callable[..., Any], label: str, options: Options
    ) -> None:
        super().__init__(fn, run, label, options)
        self._leaves = False
        """Whether operands are leaves of PyTorch's graph, because gradients by them are asked."""
        self._run = self._on_replica if isinstance(fn, torch.nn.Module) else run
        if options.out_arg is not None:
            raise SignatureError(
                f"out_arg of {label} is for the bridge, where results land in XLA's buffers; "
                "lower=True has no copies to save."
            )
        enable()

    def __repr__(self) -> str:
        return f"torch2jax({self._label}, lower=True)"

    def untraced(self) -> LoweredFunction:
        """Return a copy without cached traces, which runs ``fn`` when it is called."""
        return LoweredFunction(self.__wrapped__, self._run, self._label, self._options)

    def _knowing(self, call: Any, operands: Sequence[Any], run: Callable[..., Any]) -> Any:
        rehearsal = functools.partial(self._rehearsal, call, operands)
        return retried(self, lambda: run(*operands), rehearsal)

    def _rehearsal(self, call: Any, operands: Sequence[Any]) -> Rehearsal:
        """Return a run on the operands; examples or made-up values stand for those without one."""
        key = []
        if self._options.stochastic:
            *operands, rng = operands
            key = [jax.random.key(0) if isinstance(rng, Tracer) else rng]
        by_operand = OperandOptions(self.__wrapped__, self._options, call.arguments, self._label)
        values: list[Any] = []
        others: list[Any] = []
        by_examples = made_up = False
        for i, x in enumerate(operands):
            if is_unknown(x):
                by_examples |= i in by_operand.examples
                value = by_operand.example_value(i, tuple(x.shape))
                with jax.ensure_compile_time_eval():  # a trace may be under way
                    if value is None:
                        spec = Spec(tuple(x.shape), dtype_j2t(x.dtype), torch.device("cpu"))
                        value, other = sample_of(i, spec), sample_of(i, spec, 1)
                        made_up |= not torch.equal(value, other)
                    else:
                        other = value
                    value, other = (from_torch(v).astype(x.dtype) for v in (value, other))
            else:
                value = other = x
            values.append(value)
            others.append(other)
        run, again = (
            functools.partial(self._trace_here, call, [*xs, *key]) for xs in (values, others)
        )
        return Rehearsal(run, by_examples, again if made_up else None)

    def _trace_here(self, call: Any, operands: Any, shards: Shards | None = None) -> Any:
        key = None
        if self._options.stochastic:
            key, operands = self._words(operands[-1]), operands[:-1]
        by_operand = OperandOptions(self.__wrapped__, self._options, call.arguments, self._label)
        labels = call.arguments.labels
        nondiff = by_operand.nondiff(labels)
        arrays = [
            jax.lax.stop_gradient(x) if i in nondiff else jax.numpy.asarray(x)
            for i, x in enumerate(operands)
        ]
        avals = [jax.typeof(x) for x in arrays]
        for label, a in zip(labels, avals, strict=True):
            refuse_symbolic(a.shape, f"{label} of {self._label}")
        carried = [dtype_j2t(a.dtype) for a in avals]
        inplace = by_operand.of_argnums(self._options.inplace_argnums, "inplace_argnums")

        def attempt(casts: Casts) -> Any:
            if not self._leaves:
                try:
                    return attempt_once(casts)
                except RuntimeError as error:
                    if not needs_gradients(error):
                        raise
                # It differentiates by its operands, as PyTorch's users do by parameters.
                self._leaves = True
            return attempt_once(casts)

        def attempt_once(casts: Casts) -> Any:
            dtypes = dict(enumerate(carried)) | dict(casts)
            told = telling(f"tracing {self._label} with lower=True")
            with told, nothing_kept(), restored_after(ValuesAsked, (self.__wrapped__,)):
                return self._run_on(call.arguments, arrays, list(dtypes.values()), key, inplace)

        casts = by_operand.casts([a.dtype for a in avals])
        narrow = by_operand.narrow([a.dtype for a in avals])
        if not narrow:
            return attempt(casts)
        # Without x64 PyTorch's int64 comes as int32. The arrays stay, and their tensors say int64.
        try:
            return attempt(widened(casts, narrow))
        except Torch2JaxError:
            raise
        except Exception as error:
            try:  # fn may mean int32, as when it updates a tensor of int32
                return attempt(casts)
            except Exception:
                raise error from None

    def _run_on(
        self,
        arguments: Arguments,
        arrays: list[Any],
        dtypes: list[torch.dtype],
        key: Any,
        inplace: tuple[int, ...],
    ) -> Any:
        tensors = [_argument(x, d) for x, d in zip(arrays, dtypes, strict=True)]
        args, kwargs = arguments.unflatten(tensors)
        with running(self._options.default_dtype, key, not self._leaves), self._modules():
            if isinstance(self._run, Forward):
                _say_wide(self._run.layout, args[0])
            if self._leaves:
                _make_leaves((args, kwargs))
            if isinstance(self._run, Forward):
                _apply_hooks(self._run.layout, args[0])
            out = loans.scoped(self._run)(*args, **kwargs)
            if inplace and out is None:
                result = None
            else:
                found, treedef = flatten_result(out, self._label)
                self._check_shapes([t for _, t in found], treedef, arrays)
                result = treedef.unflatten([_result(t) for _, t in found])
            updated = [_result(tensors[i]) for i in inplace]
        if not self._options.inplace_argnums:
            return result
        return self._options.with_updated(arguments, inplace, result, updated)

    def _on_replica(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``fn``, a module, which takes its tensors for constants and changes nothing."""
        module: Any = self.__wrapped__
        layout = Layout(module)
        for dtype in {x.dtype for tensors in layout.tensors.values() for x in tensors.values()}:
            admit(dtype)
        variables: dict[str, dict[str, torch.Tensor]] = {
            group: {k: wrap(from_torch(x), x.dtype) for k, x in tensors.items()}
            for group, tensors in layout.tensors.items()
        }
        if self._leaves:
            _make_leaves(variables)
        training = getattr(module, "training", False)  # a frozen TorchScript has none
        forward = Forward(layout, training, lambda replica: replica, True)
        out = forward(variables, *args, **kwargs)
        return out[0] if training else out

    def _modules(self) -> Any:
        """Return the scope in which modules are called."""
        return nothing_bridged() if self._options.strict else module_calls(self)

    def _check_shapes(self, found: list[Any], treedef: Any, arrays: list[Any]) -> None:
        if self._options.output_shapes is None:
            return
        dtypes = [x.dtype for x in arrays]
        declared = results.declared_result(self._options.output_shapes, dtypes, self._label)
        got = [(tuple(t.shape), canonical(t.dtype)) for t in found]
        expected = [(leaf.shape, leaf.dtype) for leaf in declared.leaves]
        if treedef != declared.treedef or got != expected:
            raise SignatureError(
                f"{self._label} returned {_named(treedef, got)}, and output_shapes says "
                f"{_named(declared.treedef, expected)}."
            )


def _make_leaves(tree: Any) -> None:
    for x in torch_tree.tree_leaves(tree):
        if type(x) is Tensor and (x.is_floating_point() or x.is_complex()):
            x.requires_grad_()


def _say_wide(layout: Layout, variables: Any) -> None:
    """Let variables that JAX carries as float32 be float64 to the module, as its own are."""
    for group in variables.values():
        for name, x in group.items():
            own = layout.dtypes.get(name)
            if own is not None and is_carried(own) and x.dtype is NARROWED[own]:
                group[name] = wrap(value_of(x), own)


def _apply_hooks(layout: Layout, variables: Any) -> None:
    """Apply the hooks that the module's own parameters have."""
    for group, tensors in layout.tensors.items():
        for name, x in tensors.items():
            if name in variables.get(group, {}):
                hooks.apply_hooks(x, variables[group][name])


def _named(treedef: Any, leaves: list[Any]) -> str:
    return str(treedef.unflatten([f"{d}[{','.join(map(str, s))}]" for s, d in leaves]))


def _argument(x: Any, dtype: torch.dtype) -> Tensor:
    want = canonical(dtype)
    return wrap(x if x.dtype == want else x.astype(want), dtype)


def _result(t: torch.Tensor) -> Any:
    return value_of(t) if isinstance(t, Tensor) else from_torch(t)
