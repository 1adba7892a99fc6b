"""The avals of a call decide what it binds: a callee and the shapes of its results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import torch

from ..._compat.jax import default_device as jax_default_device
from ..._conversions.dtypes import dtype_j2t, x64_enabled
from ..._errors import (
    SignatureError,
    Torch2JaxError,
    Torch2JaxWarning,
    TorchCallError,
    UnsupportedDtypeError,
)
from ..._progress import telling
from ..._refusals import refuse_symbolic
from ..torch_side.callee import Callee, CalleeOptions
from ..torch_side.derivatives import UserProgram
from ..torch_side.gradients import Differentiating, needs_gradients, with_dense_gradients
from ..torch_side.inference import (
    FakeSurvived,
    Inference,
    NotInferred,
    ShapeDependsOnValues,
    Spec,
    ValuesNeeded,
    infer,
)
from ..torch_side.integers import IntegerUse
from ..torch_side.modules.forward import Forward
from ..torch_side.seeding import draw_seed, refusing, seeded
from . import checks, results
from .arguments import Arguments, Casts
from .attempts import Notes, attempted, widened
from .flat_function import flat_function, out_function, with_buffers
from .names import qualified_name
from .operands import OperandOptions
from .options import Options
from .results import Result, describe_result
from .shards import Shards

Avals = Sequence[tuple[tuple[int, ...], Any]]
"""These are (shape, dtype) pairs."""


@dataclass(frozen=True)
class Binding:
    """A binding is what a call binds; its structure, shapes and dtypes decide."""

    callee: Callee
    arguments: Arguments
    result: Result
    results: tuple[tuple[tuple[int, ...], Any], ...]
    inplace: tuple[int, ...]
    nondiff: frozenset[int]


@dataclass(frozen=True)
class Known:
    """A ``Known`` holds what is known of a call's operands, where it needs their values."""

    values: Sequence[torch.Tensor | None] = ()
    """The operands' values, None where one is not known; or nothing."""
    trusted: bool = False
    """Whether a shape may follow them, as it may follow examples."""
    others: Sequence[torch.Tensor | None] = ()
    """The values that they have where other integers are made up; nothing where none are."""


class Planner:
    """The planner makes the bindings of one wrapped function: ``fn`` under ``options``.

    ``run`` is ``fn`` under its lock and the default device of wrap time.
    """

    def __init__(
        self, fn: Callable[..., Any], run: Callable[..., Any], label: str, options: Options
    ) -> None:
        self._wrapped, self._fn = fn, run
        self._label, self._options = label, options
        self.notes = Notes(label)
        self._callees: dict[Hashable, Callee] = {}

    @functools.cached_property
    def _callee_options(self) -> CalleeOptions:
        # They are made at the first trace, as asking for the default device starts JAX's backend.
        fn, options = self._wrapped, self._options
        return CalleeOptions(
            label=self._label,
            name=options.name or qualified_name(fn),
            named=options.name is not None,
            default_dtype=options.default_dtype,
            device=default_device(),
            roots=(fn,),
            vmap_method=options.vmap_method,
            tape=options.tape,
            compiled=options.compiled,
            side_effects=options.side_effects,
            borrows=isinstance(fn, Forward),
        )

    @functools.cached_property
    def seed(self) -> Callee:
        """This callee draws the seed for functions that draw random numbers without a key."""
        options = replace(self._callee_options, draws=True)
        return Callee(UserProgram(draw_seed, None, False, ()), options, [], ["the seed"])

    def plan(
        self,
        arguments: Arguments,
        avals: Avals,
        numbers: Sequence[bool],
        shards: Shards | None = None,
        known: Known | None = None,
    ) -> Binding:
        """Return what a call binds; with ``shards``, what it binds on one shard.

        ``numbers`` says which operands come from Python numbers.
        """
        self._check_avals(arguments, avals)
        by_operand = OperandOptions(self._wrapped, self._options, arguments, self._label)
        arguments = replace(arguments, casts=by_operand.casts([d for _, d in avals]))
        inplace = by_operand.of_argnums(self._options.inplace_argnums, "inplace_argnums")
        inference = None
        if self._options.output_shapes is not None:
            dtypes = [d for _, d in avals]
            result = results.declared_result(self._options.output_shapes, dtypes, self._label)
            if not (result.leaves or inplace or self._options.side_effects):
                raise SignatureError(
                    f"output_shapes of {self._label} describes no tensor, so there is nothing to "
                    "compute. Describe the result; or wrap it with side_effects=True if it is "
                    "called for its effect alone."
                )
            if shards is not None:
                result = shards.result(result, bool(inplace))
            # Nobody has seen what fn does with them: see NOTE [Integers of 64 bits].
            casts = widened(arguments.casts, by_operand.narrow(dtypes))
            arguments = replace(arguments, casts=casts)
        else:
            arguments, inference = self._infer(
                arguments, by_operand, avals, numbers, bool(inplace), known
            )
            result = inference.result
            copies = tuple(sorted(inference.mutated - set(inplace)))
            if copies:
                self.notes.private_copies([arguments.labels[i] for i in copies])
                arguments = replace(arguments, copies=copies)
        updated = [avals[i] for i in inplace]
        return Binding(
            self._callee(arguments, result, inplace, inference),
            arguments,
            result,
            (*((leaf.shape, leaf.dtype) for leaf in result.leaves), *updated),
            inplace,
            by_operand.nondiff(arguments.labels),
        )

    def _check_avals(self, arguments: Arguments, avals: Avals) -> None:
        for label, (shape, dtype) in zip(arguments.labels, avals, strict=True):
            refuse_symbolic(shape, f"{label} of {self._label}")
            try:
                dtype_j2t(dtype)
            except UnsupportedDtypeError as error:
                raise UnsupportedDtypeError(f"{label} of {self._label}: {error}") from None

    def _infer(
        self,
        arguments: Arguments,
        by_operand: OperandOptions,
        avals: Avals,
        numbers: Sequence[bool],
        none_allowed: bool,
        known: Known | None,
    ) -> tuple[Arguments, Inference]:
        """Infer what ``fn`` returns, and return the arguments with the casts that it needs."""
        device = self._callee_options.device
        dtypes = [dtype_j2t(dtype) for _, dtype in avals]

        def attempt(casts: Casts, integers: IntegerUse) -> Inference:
            try:
                return attempt_once(casts, integers, False)
            except RuntimeError as error:
                if not needs_gradients(error):
                    raise
            return replace(attempt_once(casts, integers, True), differentiates=True)

        def spec(i: int, shape: tuple[int, ...]) -> Spec:
            value = by_operand.example_value(i, shape)
            if value is None and known and known.values:
                found = known.values[i]
                if found is not None and tuple(found.shape) == shape:
                    other = known.others[i] if known.others else None
                    return Spec(shape, dtypes[i], device, found, known.trusted, other)
            return Spec(shape, dtypes[i], device, value)

        def attempt_once(casts: Casts, integers: IntegerUse, differentiates: bool) -> Inference:
            tried = replace(arguments, casts=casts)
            specs = [spec(i, shape) for i, (shape, _) in enumerate(avals)]
            call = tried.applied(self._fn)
            if differentiates:
                call = Differentiating(call, True)
            with jax.ensure_compile_time_eval():  # fn may call JAX, on values
                return infer(
                    lambda *operands: call(*tried.prepare(operands)),
                    specs,
                    lambda out: describe_result(
                        out, self._label, none_allowed or self._options.side_effects
                    ),
                    self._options.default_dtype,
                    self._callee_options.roots,
                    integers,
                    guess=known is not None,
                )

        try:
            with telling(f"inferring what {self._label} returns"):
                casts, inference = attempted(
                    attempt,
                    arguments.casts,
                    by_operand.narrow([dtype for _, dtype in avals]),
                    arguments.labels,
                    self.notes,
                )
            return replace(arguments, casts=casts), inference
        except FakeSurvived:
            raise Torch2JaxError(
                f"{self._label} keeps a tensor of the run that infers its result, where it cannot "
                "be taken out again (that is no module, dict, list, attribute, global or "
                "lru_cache), so its next call would compute garbage. To go on, empty that cache "
                "and pass output_shapes=, which needs no such run, or remove the cache."
            ) from None
        except ShapeDependsOnValues:
            raise SignatureError(
                f"the shape of {self._label}'s result depends on the values of its arguments, and "
                "XLA must know shapes when it compiles. Return a result of fixed size (a mask, or "
                "padded), or pass output_shapes= if the size is known."
                + self._hint_of_numbers(arguments, numbers)
            ) from None
        except ValuesNeeded:
            raise
        except NotInferred as found:
            raise self._not_inferred(found, arguments, avals, numbers) from found.error
        except (Torch2JaxError, Torch2JaxWarning):  # the latter is a note where warnings are errors
            raise
        except Exception as error:
            raise self._trace_error(error, arguments, avals, numbers) from error

    def _not_inferred(
        self, found: NotInferred, arguments: Arguments, avals: Avals, numbers: Sequence[bool]
    ) -> TorchCallError:
        hint = self._hint_of_numbers(arguments, numbers)
        return TorchCallError(
            f"{self._label} asks for values, which are not known when it is traced: "
            f"{found.question}. On made-up values it raised {type(found.error).__name__}: "
            f"{found.error}\nCall it once outside of jax.jit, or give examples: "
            "torch2jax(fn, *examples) or from_module(module, *example_args); or pass "
            f"output_shapes=.{hint}\n{_traced_for(arguments, avals)}"
        )

    def _trace_error(
        self, error: Exception, arguments: Arguments, avals: Avals, numbers: Sequence[bool]
    ) -> TorchCallError:
        text = f"{error}{self._hint_of_numbers(arguments, numbers)}"
        return TorchCallError(
            f"{self._label} raised {type(error).__name__} when it was traced: "
            + "\n".join([text, *getattr(error, "__notes__", ()), _traced_for(arguments, avals)])
        )

    def _hint_of_numbers(self, arguments: Arguments, numbers: Sequence[bool]) -> str:
        scalars = [label for label, n in zip(arguments.labels, numbers, strict=True) if n]
        if not scalars:
            return ""
        return (
            f"\n(ints and floats reach it as 0-d tensors, here {', '.join(scalars)}: name them in "
            "static_argnums or static_argnames if it needs Python numbers)"
        )

    def _callee(
        self,
        arguments: Arguments,
        result: Result,
        inplace: tuple[int, ...],
        inference: Inference | None,
    ) -> Callee:
        """Return the one callee for this way from flat operands to a flat result."""
        forms = tuple((leaf.torch_dtype, leaf.dtype) for leaf in result.leaves)
        key = (arguments, result.treedef, forms, x64_enabled())
        known = self._callees.get(key)
        if known is not None:
            return known
        fn = self._fn
        if inference is not None and inference.sparse_gradients:
            fn = with_dense_gradients(fn)
        out_arg = self._options.out_arg
        if out_arg is not None and checks.requires(self._wrapped, out_arg):
            fn = with_buffers(fn, out_arg, result)
        pure, run, bare = flat_function(fn, arguments, result, self._label, inplace)
        mutated = tuple(sorted({*inplace, *arguments.copies}))
        options = replace(self._callee_options, mutated=mutated)
        inputs = list(arguments.labels)
        outputs = [leaf.label for leaf in result.leaves]
        if inplace:
            n = len(outputs)
            # A library may write a result before it has read all of an operand.
            aliases = tuple((i, n + k) for k, i in enumerate(() if options.compiled else inplace))
            options = replace(options, aliases=aliases)
            outputs += [f"the updated {arguments.labels[i]}" for i in inplace]
        elif out_arg is not None:
            run = out_function(self._fn, arguments, result, out_arg, self._label)
            options = replace(options, pass_outputs=True)
            bare = None
        if inference is None or inference.differentiates:
            known = inference is not None
            pure = Differentiating(pure, known)
            run, bare = Differentiating(run, known) if run else None, None
        draws = inference.draws if inference is not None else None
        if draws and isinstance(self._wrapped, Forward) and self._wrapped.refuses_draws:
            raise SignatureError(
                f"{self._label} draws random numbers ({draws}): pass a JAX key as rng=."
            )
        if self._options.stochastic or draws:
            rng = len(inputs)
            inputs.append("rng")
            options = replace(options, rng=rng)
            pure, run = seeded(pure, rng), seeded(run, rng) if run else None
            bare = None
        elif inference is None:
            run, pure = run or pure, refusing(pure, self._label)
        forward_ad = inference is not None and inference.forward_ad and not inference.differentiates
        program = UserProgram(pure, run, forward_ad, options.roots, bare)
        return self._callees.setdefault(key, Callee(program, options, inputs, outputs))


def _traced_for(arguments: Arguments, avals: Avals) -> str:
    operands = [
        f"{label}: {dtype}[{','.join(map(str, shape))}]"
        for label, (shape, dtype) in zip(arguments.labels, avals, strict=True)
    ]
    # The arguments of a module's call come last, after its parameters.
    left_out = len(operands) - _SHOWN
    first = [f"{left_out} more, ..."] if left_out > 0 else []
    return f"(traced for {', '.join([*first, *operands[-_SHOWN:]])})"


_SHOWN = 8

# It is made here, where no mode of a caller sees it.
_CPU = torch.device("cpu")


def default_device() -> torch.device:
    """Return the device on which torch computes for JAX's default device.

    PyTorch numbers GPUs as the driver does, and its current one may be another: with one GPU per
    process, weights are on the GPU of the process, whatever PyTorch's current device is.
    """
    device = jax_default_device()
    if device.platform == "gpu" and torch.cuda.is_available():
        return torch.device("cuda", device.local_hardware_id)
    return _CPU
