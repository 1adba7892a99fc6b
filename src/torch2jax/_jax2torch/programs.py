"""Programs are a JAX function on flat arrays, and the functions derived from it.

This file never imports torch. A *program* maps arrays to a tuple of arrays. With operands ``x``,
tangents ``t`` of the operands ``S`` and cotangents ``c`` of the results ``D``,

    Pushforward(f, S):  (x, t) -> ∂f/∂x_S(x) · t
    Pullback(f, S, D):  (x, c) -> (∂f_D/∂x_S(x))ᴴ · c
    Batch(f, dims):     f on every row of the operands whose dim is not None; rows at dim 0
    WithResiduals(f, S):     x -> f(x) and the residuals r that Pullback(f, S', D) reads, S' in S

are programs again, so derivatives of any order are calls of programs.

NOTE [Two forms]. Derivatives are made of ``math``. ``run``, which is compiled, has the same values
and may use residuals: it then ignores ``x`` but for what the residuals name, and a derivative of it
would miss terms. ``Pullback(f, S, D, recipe)`` takes ``(x, c, r)``; its ``math`` ignores ``r``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._bridge.handler.extension import in_gpu_call
from .._compat.jax import has_run
from .._conversions.cotangents import cotangents_of, gradient_of
from .._errors import Torch2JaxError
from .residuals import Facts, Indices, PullbackRecipe, Traced, unflatten

Flags = tuple[bool, ...]
Dims = tuple["int | None", ...]
Math = Callable[..., "Traced"]
Asked = tuple["JaxProgram | None", Indices, Indices]


jax.tree_util.register_pytree_node(
    Traced, lambda traced: ((traced.outs, traced.residuals), traced.facts), unflatten
)


class Formula:
    """A formula says what a program computes, in two forms; it does not know its derivatives."""

    emits = True
    """Whether it can emit residuals: it cannot where ``run`` already differs from ``math``."""

    reads: frozenset[int] | None = None
    """The operands that ``run`` reads; None means all."""

    def __init__(self, name: str) -> None:
        self.name = name

    def math(self, *operands: Any) -> Traced:
        raise NotImplementedError

    def run(self, *operands: Any) -> Traced:
        return self.math(*operands)


class Function(Formula):
    """A ``Function`` is the user's function: ``call`` returns its results as a tree."""

    def __init__(self, call: Callable[..., Any], check: Callable[[Any], Any], name: str) -> None:
        super().__init__(name)
        self._call, self._check = call, check

    def math(self, *operands: Any) -> Traced:
        leaves, tree = jax.tree.flatten(self._check(self._call(*operands)))
        return Traced(tuple(map(jnp.asarray, leaves)), (), Facts(tree))


class WithResiduals(Formula):
    """A ``WithResiduals`` is ``x -> f(x), r``."""

    emits = False

    def __init__(self, parent: Formula, wrt: Indices) -> None:
        super().__init__(f"{parent.name}_with_residuals")
        self.parent, self.wrt = parent, wrt

    def math(self, *operands: Any) -> Traced:
        return self.parent.math(*operands)

    def run(self, *operands: Any) -> Traced:
        chosen = [operands[i] for i in self.wrt]
        traced, pull = jax.vjp(_restricted(self.parent, self.wrt, operands), *chosen)
        recipe = PullbackRecipe(self.wrt, operands, traced, pull)
        residuals, recipe.residuals = tuple(recipe.residuals), []
        return Traced(traced.outs, residuals, Facts(traced.facts.tree, recipe))


class Pullback(Formula):
    """A ``Pullback`` is ``(x, c, r) -> Jᴴ c``.

    See NOTE [Two forms], and NOTE [Conjugates] in ``cotangents.py``.
    """

    def __init__(
        self, parent: Formula, n: int, wrt: Indices, of: Indices, recipe: PullbackRecipe | None
    ) -> None:
        super().__init__(f"{parent.name.removesuffix('_with_residuals')}_pullback")
        self.parent, self.n, self.wrt, self.of, self.recipe = parent, n, wrt, of, recipe
        self.emits = recipe is None
        if recipe is not None:
            self.reads = recipe.reads

    def _split(self, args: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        end = self.n + len(self.of)
        return args[: self.n], args[self.n : end], args[end:]

    def math(self, *args: Any) -> Traced:
        x, c, _ = self._split(args)
        chosen = [x[i] for i in self.wrt]
        traced, pull = jax.vjp(_restricted(self.parent, self.wrt, x), *chosen)
        avals = [(out.shape, out.dtype) for out in traced.outs]
        return self._result(pull(self._cotangents(avals, c, traced.facts)))

    def run(self, *args: Any) -> Traced:
        if self.recipe is None:
            return self.math(*args)
        x, c, r = self._split(args)
        pulled = self.recipe.pull(x, r)(self._cotangents(self.recipe.avals, c, self.recipe.facts))
        by_operand = dict(zip(self.recipe.wrt, pulled, strict=True))
        return self._result([by_operand[i] for i in self.wrt])

    def _cotangents(self, avals: Sequence[Any], c: Sequence[Any], facts: Facts) -> Traced:
        given = dict(zip(self.of, c, strict=True))
        full = cotangents_of([given.get(j) for j in range(len(avals))], avals)
        return Traced(tuple(full), (), facts)

    def _result(self, pulled: Sequence[Any]) -> Traced:
        return Traced(tuple(map(gradient_of, pulled)), (), Facts())


class Pushforward(Formula):
    """A ``Pushforward`` is ``(x, t) -> J t``, of the results of inexact dtype."""

    def __init__(self, parent: Formula, n: int, wrt: Indices) -> None:
        super().__init__(f"{parent.name.removesuffix('_with_residuals')}_pushforward")
        self.parent, self.n, self.wrt = parent, n, wrt

    def math(self, *args: Any) -> Traced:
        x, t = args[: self.n], args[self.n :]
        f = _restricted(self.parent, self.wrt, x)
        _, pushed = jax.jvp(f, tuple(x[i] for i in self.wrt), tuple(t))
        inexact = [u for u in pushed.outs if jnp.issubdtype(u.dtype, jnp.inexact)]
        return Traced(tuple(inexact), (), Facts())


class Batch(Formula):
    """A ``Batch`` is ``f`` on every row."""

    def __init__(self, parent: Formula, dims: Dims) -> None:
        super().__init__(f"{parent.name}_vmap")
        self.parent, self.dims = parent, dims
        self.emits, self.reads = parent.emits, parent.reads

    def math(self, *operands: Any) -> Traced:
        return jax.vmap(self.parent.math, self.dims)(*operands)

    def run(self, *operands: Any) -> Traced:
        return jax.vmap(self.parent.run, self.dims)(*operands)


class JaxProgram:
    """A JaxProgram is a compiled formula with the programs derived from it, each made once.

    NOTE [No cycles]. Derived programs refer to formulas, never to programs, and what JAX's caches
    hold (recipes) refers to neither. So all that is compiled goes with the last reference to a
    program. Left to the garbage collector, jitted functions would be collected inside of JAX's own
    tracing, which up to jaxlib 0.10 can crash (jax pull request 38281).
    """

    def __init__(self, formula: Formula) -> None:
        self.formula, self.name = formula, formula.name
        self.emits, self.reads = formula.emits, formula.reads
        self.is_emission = isinstance(formula, WithResiduals)
        self.sites: dict[Any, Any] = {}  # compiled graphs call it there: see ``graph_sites``
        self._derived: dict[Any, JaxProgram] = {}
        self._asked: dict[Any, Asked] = {}

        def call(*operands: Any) -> Traced:
            traced = formula.run(*operands)
            traced.facts.n_out = len(traced.outs)
            traced.facts.dtypes = frozenset(x.dtype for x in (*traced.outs, *traced.residuals))
            return traced

        call.__name__ = call.__qualname__ = self.name
        self.jitted = jax.jit(call)

    def refuse_compiling(self) -> None:
        """Raise in a call on a GPU where the program has never been compiled.

        XLA's compiler tries kernels on the GPU, and to be alone there it waits for the programs
        that run on it. The one around the call would wait for the compiler: a deadlock.
        """
        if in_gpu_call() and not has_run(self.jitted):
            raise Torch2JaxError(
                f"{self.name}, a JAX function, is called for the first time inside a torch2jax "
                "function that runs on a GPU. JAX would compile it there, and XLA's compiler waits "
                "for the programs that run on the GPU, this one too: a deadlock. Call it once "
                "before, with arguments of the same shapes, or compose the functions in JAX."
            )

    def emission(self, wrt: Indices) -> JaxProgram:
        return self._derived.get((WithResiduals, wrt)) or self._derive(WithResiduals, wrt)

    def pushforward(self, n: int, wrt: Indices) -> JaxProgram:
        return self._derive(Pushforward, n, wrt)

    def pullback(
        self, n: int, wrt: Indices, of: Indices, recipe: PullbackRecipe | None
    ) -> JaxProgram:
        return self._derive(Pullback, n, wrt, of, recipe)

    def asked(self, needs: Flags, missing: Flags, recipe: PullbackRecipe) -> Asked:
        """Return the pullback that a backward pass asks for (None where it is zero), wrt and of.

        ``needs`` says which operands need a gradient, and ``missing`` which cotangents are not
        there.
        """
        key = (needs, missing, recipe)
        return self._asked.get(key) or self._asked.setdefault(key, self._ask(*key))

    def _ask(self, needs: Flags, missing: Flags, recipe: PullbackRecipe) -> Asked:
        wrt = tuple(i for i, need in enumerate(needs) if need)
        of = tuple(j for j, none in enumerate(missing) if not none)
        return self.pullback(len(needs), wrt, of, recipe) if wrt and of else None, wrt, of

    def batch(self, dims: Dims) -> JaxProgram:
        return self._derive(Batch, dims)

    def _derive(self, kind: type[Formula], *how: Any) -> JaxProgram:
        key = (kind, *how)
        made = self._derived.get(key)
        make: Any = kind
        return made or self._derived.setdefault(key, JaxProgram(make(self.formula, *how)))


def _restricted(formula: Formula, wrt: Indices, operands: Sequence[Any]) -> Math:
    """Return ``math`` as a function of the operands ``wrt``, with the others held."""

    def f(*chosen: Any) -> Traced:
        full = list(operands)
        for i, x in zip(wrt, chosen, strict=True):
            full[i] = x
        return formula.math(*full)

    return f
