"""A callee has a program, and callees derived from it. This file imports torch, never JAX."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .derivatives import Jvp, Program, Rows, Vjp, Vmap
from .gradients import Dims, Indices

_deriving = threading.RLock()


@dataclass(frozen=True, eq=False)
class CalleeOptions:
    """All callees derived from one wrapped function share these options."""

    label: str
    """The user's function in messages."""
    name: str
    """Root of the name in HLO."""
    named: bool
    """Whether the user chose the name: it then carries no counter."""
    default_dtype: torch.dtype
    device: torch.device
    """Where stand-ins for operands live at trace time."""
    roots: tuple[Any, ...] = ()
    """Objects from which inference finds the modules that it must leave as they are."""
    vmap_method: str = "auto"
    side_effects: bool = False
    aliases: tuple[tuple[int, int], ...] = ()
    """(operand, output) pairs of the root's call that share memory."""
    tape: bool = True
    """Whether a differentiated call keeps its autograd graph for the backward pass."""
    borrows: bool = False
    """Whether calls borrow replicas of a module: see ``modules/loans.py``."""
    mutated: tuple[int, ...] = ()
    """Operands that ``fn`` changes in place, or of which it changes a copy."""
    rng: int | None = None
    """The operand that holds the words of a key. Random numbers are drawn from it."""
    draws: bool = False
    """Whether it takes numbers from torch's generator: it is never dropped, merged or moved."""
    compiled: bool = False
    """Whether XLA calls libraries that PyTorch compiled, instead of Python."""
    pass_outputs: bool = False
    """The root's ``run`` takes the output buffers after the operands."""
    notes: set[Any] = field(default_factory=set)
    """Keys of the warnings that were given: each is given once."""


class Callee:
    """A callee is a program as JAX knows it: an identity, a name and derived callees.

    A derived callee holds its parent. A parent holds what is derived from it weakly, so that a
    callee lives as long as a wrapper, a jaxpr or an executable that uses it.
    """

    def __init__(
        self,
        program: Program,
        options: CalleeOptions,
        inputs: Sequence[str],
        outputs: Sequence[str],
        parent: Callee | None = None,
        suffix: str = "",
        token_at: int | None = None,
        keep: Callee | None = None,
        tokens: int = 1,
        plain: Callee | None = None,
        residuals: Any = None,
        inner: Callee | None = None,
    ) -> None:
        self.program: Any = program
        self.options = options
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.parent, self.suffix = parent, suffix
        self.token_at = token_at
        """The operand that is a token, where this callee takes one. See ``tape``."""
        self.keep = keep
        """The callee whose graphs that token names."""
        self.tokens = tokens
        """How many operands there are residuals, where this callee is compiled."""
        self.plain = plain
        """The callee that computes the same without them."""
        self.residuals: tuple[tuple[tuple[int, ...], Any], ...] = residuals or ()
        """Shapes and dtypes of its last outputs, which are residuals: see ``compiled.calls``."""
        self.name: str | None = None
        """The name of a root in HLO, once it has one: ``entries`` gives it."""
        self.registrations: list[Any] = [None, None]
        """Entries in the handler's table, for one device and for several; made by ``entries``."""
        self.jitted: dict[Any, Any] = {}
        """Calls outside of jit, by the primitive's parameters; made by ``primitive``."""
        self.inner = inner
        """The callee on whose rows it works, where residuals have rows."""
        self.splits: dict[str, Any] = {}
        """Compiled derivatives, by what they were traced for; made by ``compiled.calls``."""
        self.libraries: dict[Any, Any] = {}
        """Libraries of a compiled callee, by operands; made by ``compiled.libraries``."""
        self.refusals: dict[Any, str | None] = {}
        """Why batches of a root cannot be, by path and operands; ``batching`` finds the reasons."""
        self._derived: weakref.WeakValueDictionary[str, Callee] = weakref.WeakValueDictionary()

    def __repr__(self) -> str:
        return f"<{self.options.label}{self.path}>"

    @property
    def root(self) -> Callee:
        """The root is the callee of the user's function."""
        return self if self.parent is None else self.parent.root

    @property
    def path(self) -> str:
        """The path leads here from the user's function, as in ``/vjp(0;0)/vmap(0,None)``."""
        return (self.parent.path if self.parent else "") + self.suffix

    @property
    def shown(self) -> str:
        """Profiles show this name: ``my_loss``, or ``my_loss_vjp`` for its backward pass."""
        called = self.options.name if self.options.named else self.options.label
        own = re.sub(r"\W+", "_", called.rpartition("<locals>.")[2]).strip("_")
        steps = [x for x in re.findall(r"/(\w+)\(", self.path) if x not in ("keep", "tape")]
        return "_".join([own or "call", *steps])

    def without_token(self, operands: Sequence[Any]) -> Sequence[Any]:
        """Return this callee's operands, or facts about them, without tokens and residuals."""
        at = self.token_at
        return operands if at is None else [*operands[:at], *operands[at + self.tokens :]]

    def derive(
        self,
        suffix: str,
        make: Callable[[], Program],
        inputs: Sequence[str],
        outputs: Sequence[str],
        token_at: int | None = None,
        keep: Callee | None = None,
        **residuals: Any,
    ) -> Callee:
        """Return the callee of ``make()`` under this one's name and ``suffix``.

        It is made when it is first asked for.
        """
        child = self._derived.get(suffix)
        if child is None:
            with _deriving:  # two threads would each make one of this name
                child = self._derived.get(suffix)
                if child is None:
                    program = make()
                    child = Callee(
                        *(program, self.options, inputs, outputs, self, suffix, token_at, keep),
                        **residuals,
                    )
                    self._derived[suffix] = child
        return child

    def jvp(self, wrt: Indices, of: Indices) -> Callee:
        """Return ``(x, tangents of wrt) -> tangents of the outputs of``."""
        tangents = [f"the tangent of {self.inputs[i]}" for i in wrt]
        return self.derive(
            f"/jvp({_join(wrt)};{_join(of)})",
            lambda: Jvp(self.program, wrt, of),
            [*self.inputs, *tangents],
            [f"the tangent of {self.outputs[i]}" for i in of],
        )

    def vjp(self, wrt: Indices, of: Indices) -> Callee:
        """Return ``(x, cotangents of the outputs of) -> cotangents of wrt``."""
        cotangents = [f"the cotangent of {self.outputs[i]}" for i in of]
        return self.derive(
            f"/vjp({_join(wrt)};{_join(of)})",
            lambda: Vjp(self.program, wrt, of),
            [*self.inputs, *cotangents],
            [f"the cotangent of {self.inputs[i]}" for i in wrt],
        )

    def vmap(self, dims: Dims) -> Callee:
        """Return this callee on every row of the operands whose dim is not None."""
        return self._batched("vmap", Vmap, dims)

    def rows(self, dims: Dims) -> Callee:
        """Return the same, one row after the other, for rows with random numbers of their own."""
        return self._batched("rows", Rows, dims)

    def _batched(self, name: str, program: type[Vmap], dims: Dims) -> Callee:
        return self.derive(
            f"/{name}({_join(dims)})",
            lambda: program(self.program, dims),
            self.inputs,
            self.outputs,
        )

    def batched_like(self, program: Vmap, dims: Dims) -> Callee:
        """Return this callee, batched the way ``program`` is."""
        return self.rows(dims) if isinstance(program, Rows) else self.vmap(dims)

    def batch_levels(self) -> list[Dims]:
        """Return the dims of the operands in each enclosing batch, the outermost first."""
        levels = []
        callee: Callee | None = self
        while callee is not None and isinstance(callee.program, Vmap):
            levels.append(callee.program.dims)
            callee = callee.parent
        return levels

    @property
    def linear(self) -> range:
        """A callee is known to be linear in these operands: the last ones of a derivative."""
        callee = self
        while isinstance(callee.program, Vmap) and callee.parent is not None:
            callee = callee.parent
        end = len(self.inputs)
        if callee.parent is None or not isinstance(callee.program, Jvp | Vjp):
            return range(end, end)
        return range(len(callee.parent.inputs), end)

    def transpose(self, linear: Indices, of: Indices) -> Callee | None:
        """Return the callee ``(other operands, cotangents of of) -> cotangents of linear``.

        It is None where this callee is not known to be linear in those operands.
        """
        program = self.program
        if self.parent is None:
            return None
        if isinstance(program, Jvp | Vjp):
            n = len(self.parent.inputs)
            if min(linear) < n:
                return None
            if isinstance(program, Jvp):
                wrt = tuple(program.wrt[i - n] for i in linear)
                return self.parent.vjp(wrt, tuple(program.of[i] for i in of))
            return self.parent.jvp(
                tuple(program.wrt[i] for i in of), tuple(program.of[i - n] for i in linear)
            )
        if isinstance(program, Vmap):
            inner = self.parent.transpose(linear, of)
            if inner is None:
                return None
            others = tuple(d for i, d in enumerate(program.dims) if i not in linear)
            # The transpose drops operands that were linear too but are constant here.
            others = others[: len(inner.inputs) - len(of)]
            return inner.batched_like(program, others + (0,) * len(of))
        return None


def _join(items: Iterable[Any]) -> str:
    return ",".join(map(str, items))
