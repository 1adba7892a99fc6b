"""Programs are flat torch functions, their derivatives and batches.

This file imports torch, never JAX.

A *program* is a pure function from tensors to a tuple of tensors. Derivatives and batches of a
program are programs, and the algebra is closed: with primals ``x``, tangents ``t`` of the inputs
``S``, cotangents ``c`` of the outputs ``D``,

    Jvp(f, S, D): (x, t) -> ∂f_D/∂x_S(x) · t           linear in t
    Vjp(f, S, D): (x, c) -> c · ∂f_D/∂x_S(x)           linear in c, the transpose of Jvp(f, S, D)
    Vmap(f, dims): f on every row of the operands whose dim is not None; rows of results at dim 0

A program has three forms that compute the same:

    functional  composes with torch.func: vmap and forward mode are built from it
    graph       composes with torch.autograd: reverse mode is built from it; old-style
                autograd.Functions, compiled functions and custom kernels work here
    run         XLA calls it under no_grad, on plain tensors: nothing differentiates it further

NOTE [Conjugates]. For a complex input torch's gradient is the conjugate transpose ``Jᴴ c``. JAX's
cotangent is the plain transpose ``Jᵀ c = conj(Jᴴ conj(c))``, so a Vjp conjugates on both sides.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from ..._compat.torch import add_batch_dim, load_forward_mode, remove_batch_dim, vmap_level
from .gradients import (
    Dims,
    Indices,
    Tensor,
    Tensors,
    check_connected,
    conj,
    dense,
    further,
    gradients_by_backward,
    is_cut,
    leaf_gradients,
    refuses_grad,
    take,
    watched_leaves,
)


class Program(Protocol):
    """A program is a pure function from tensors to a tuple of tensors, in three forms."""

    @property
    def base(self) -> Program | None:
        """This program is derived from that one; it is None for the user's function."""
        ...

    def functional(self, *args: Tensor) -> Tensors: ...

    def graph(self, *args: Tensor) -> Tensors: ...

    def run(self, *args: Tensor) -> Tensors: ...


class UserProgram:
    """A ``UserProgram`` is the user's function on flat operands.

    ``pure`` changes none of its operands. ``run`` may be another function with the same results
    that works in place (see ``inplace_argnums`` and ``out_arg``). ``bare`` is ``fn`` itself, where
    nothing lies between it and the operands, with a function from its results to a tuple; the
    handler calls these.
    """

    base = None

    def __init__(
        self,
        pure: Callable[..., Tensors],
        run: Callable[..., Tensors] | None,
        forward_ad: bool,
        roots: tuple[Any, ...],
        bare: tuple[Callable[..., Any], Callable[[Any], Tensors]] | None = None,
    ) -> None:
        self.functional = self.graph = pure
        self.run = run or pure
        self.forward_ad = forward_ad
        self.roots = roots
        self.bare = bare


class Jvp:
    """A Jvp computes ``(x, t) -> ∂f_D/∂x_S(x) · t``, by forward mode or else by two pullbacks.

    The pullback ``u -> Jᴴ u`` is linear in ``u``; its own pullback at ``t``, for any ``u``, is
    ``J t``. (``u`` is ones, because torch pulls back through ``logcumsumexp`` by the logarithm of
    ``u``.) Old-style ``autograd.Function``s and operators without a forward formula need the
    pullbacks.
    """

    def __init__(self, base: Program, wrt: Indices, of: Indices) -> None:
        self.base, self.wrt, self.of = base, wrt, of
        self.forward_ad: bool = getattr(base, "forward_ad", True)
        self.by_graph = False
        """Whether ``torch.func`` has refused the user's function."""

    def functional(self, *args: Tensor) -> Tensors:
        return self._two_pullbacks_functional(*self._split(args))

    def graph(self, *args: Tensor) -> Tensors:
        return self._two_pullbacks_graph(*self._split(args))

    def run(self, *args: Tensor) -> Tensors:
        if self.first_order and not self.by_graph:
            try:
                return self.outermost(*args)
            except Exception as error:
                # torch.func refuses old-style autograd.Functions, and functions that ask autograd
                # for gradients.
                try:
                    out = self._two_pullbacks_graph(*self._split(args))
                except Exception:
                    raise error from None
                self.by_graph = True
                return out
        try:
            return self.graph(*args)
        except Exception as error:
            # torch cannot pull back twice what it can push forward and pull back: an example is
            # conv_transpose with output_padding.
            try:
                return self._by_forward_mode(self.base.functional, *self._split(args))
            except Exception:
                raise error from None

    def outermost(self, *args: Tensor) -> Tensors:
        """Run a first derivative by forward mode; nothing differentiates the result.

        When nested, torch's forward mode is silently wrong for some operators (``linalg.solve``,
        ``layer_norm``), so derivatives of derivatives go by pullbacks.
        """
        return self._either(self.base.functional, self._two_pullbacks_functional, args)

    @property
    def first_order(self) -> bool:
        return _is_users(self.base)

    def _split(self, args: Tensors) -> tuple[Tensors, Tensors]:
        at = len(args) - len(self.wrt)
        return args[:at], args[at:]

    def _either(
        self,
        forward_form: Callable[..., Tensors],
        reverse: Callable[[Tensors, Tensors], Tensors],
        args: Tensors,
    ) -> Tensors:
        primals, tangents = self._split(args)
        if not self.forward_ad:
            return reverse(primals, tangents)
        try:
            return self._by_forward_mode(forward_form, primals, tangents)
        except Exception as forward_error:
            try:
                out = reverse(primals, tangents)
            except Exception:
                raise forward_error from None
            self.forward_ad = False
            return out

    def _by_forward_mode(
        self, form: Callable[..., Tensors], primals: Tensors, tangents: Tensors
    ) -> Tensors:
        f = _restrict(form, primals, self.wrt, self.of)
        # Under no_grad, forward mode over reverse mode is silently wrong for what saves its
        # factorisation (linalg.solve, logdet). See NOTE [One forward mode].
        with _forward_mode, torch.enable_grad():
            load_forward_mode()
            out, pushed = torch.func.jvp(f, take(primals, self.wrt), tangents)  # type: ignore[misc]
        # torch promotes the tangent of a 0-d tensor beside a Python number to float64.
        return tuple(t.to(y.dtype) for t, y in zip(pushed, out, strict=True))

    def _two_pullbacks_functional(self, primals: Tensors, tangents: Tensors) -> Tensors:
        f = _restrict(self.base.functional, primals, self.wrt, self.of)
        out, pullback = torch.func.vjp(f, *take(primals, self.wrt))  # type: ignore[misc]
        u = map(torch.ones_like, out)
        with further():
            _, push = torch.func.vjp(lambda *u: pullback(u), *u)  # type: ignore[misc]
        return push(tangents)

    def _two_pullbacks_graph(self, primals: Tensors, tangents: Tensors) -> Tensors:
        with torch.enable_grad():
            primals = watched_leaves(primals, self.wrt)
            out = take(self.base.graph(*primals), self.of)
            u = tuple(torch.ones_like(o, requires_grad=True) for o in out)
            with further():
                pulled = leaf_gradients(out, take(primals, self.wrt), u, create_graph=True)
            check_connected(pulled)
            return leaf_gradients(pulled, u, tangents, create_graph=True)


# NOTE [One forward mode]. torch counts its levels of forward mode for the whole process: a call on
# one device that ends while another runs takes the tangents away from it, which are then zero.
_forward_mode = threading.RLock()


class Vjp:
    """A Vjp computes ``(x, c) -> c · ∂f_D/∂x_S(x)``. See NOTE [Conjugates]."""

    def __init__(self, base: Program, wrt: Indices, of: Indices) -> None:
        self.base, self.wrt, self.of = base, wrt, of

    def split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Split operands, or facts about them, into those of primals and those of cotangents."""
        at = len(args) - len(self.of)
        return args[:at], args[at:]

    @property
    def first_order(self) -> bool:
        return _is_users(self.base)

    def functional(self, *args: Tensor) -> Tensors:
        primals, cotangents = self.split(args)
        f = _restrict(self.base.functional, primals, self.wrt, self.of)
        derived = contextlib.nullcontext() if self.first_order else further()
        with derived:
            _, pullback = torch.func.vjp(f, *take(primals, self.wrt))  # type: ignore[misc]
        return conj(tuple(map(dense, pullback(conj(cotangents)))))

    def graph(self, *args: Tensor) -> Tensors:
        # The primals are not detached: a second derivative goes through them too.
        primals, cotangents = self.split(args)
        with torch.enable_grad():
            primals = watched_leaves(primals, self.wrt)
            out = take(self.base.graph(*primals), self.of)
            inputs = take(primals, self.wrt)
            with further():
                grads = leaf_gradients(out, inputs, conj(cotangents), create_graph=True)
            if any(map(is_cut, grads)):  # f may be linear: watched cotangents show it
                watched = watched_leaves(cotangents, tuple(range(len(cotangents))))
                check_connected(leaf_gradients(out, inputs, conj(watched), create_graph=True))
            return conj(grads)

    def run(self, *args: Tensor) -> Tensors:
        primals, cotangents = self.split(args)
        return self.pull(self.base.graph, primals, cotangents)

    def pull(
        self,
        f: Callable[..., Tensors],
        primals: Tensors,
        cotangents: Tensors,
        batched: bool = False,
    ) -> Tensors:
        """Run ``f`` forward and backward once; nothing differentiates the result further."""
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(True)
        try:
            out, leaves = self._forward(f, primals)
            try:
                return conj(leaf_gradients(out, leaves, conj(cotangents), batched=batched))
            except RuntimeError as error:
                if batched or not refuses_grad(error):
                    raise
            out, leaves = self._forward(f, primals)
            return conj(gradients_by_backward(out, leaves, conj(cotangents), roots_of(self)))
        finally:
            torch._C._set_grad_enabled(before)

    def _forward(self, f: Callable[..., Tensors], primals: Tensors) -> tuple[Tensors, Tensors]:
        """Return the outputs ``of``, and the leaves in which they are differentiated."""
        leaves = list(primals)
        for i in self.wrt:
            leaves[i] = leaves[i].detach().requires_grad_()
        return take(f(*leaves), self.of), take(leaves, self.wrt)


class Vmap:
    """A Vmap calls ``f`` on every row, in one call through ``torch.func.vmap``.

    Results have rows at dim 0. Random numbers are drawn once for all rows, as in JAX with a
    key that is not batched.
    """

    def __init__(self, base: Program, dims: Dims) -> None:
        self.base, self.dims = base, dims
        self.forward_ad: bool = getattr(base, "forward_ad", True)

    def functional(self, *args: Tensor) -> Tensors:
        return _vmap(self.base.functional, self.dims)(*args)

    def graph(self, *args: Tensor) -> Tensors:
        return self.functional(*args)

    def run(self, *args: Tensor) -> Tensors:
        vjp = self.base
        if isinstance(vjp, Vjp):
            # The rows are independent, so their pullbacks are one pullback of the batched function,
            # by torch.autograd, which is several times cheaper than torch.func inside vmap.
            primal_dims, cotangent_dims = vjp.split(self.dims)
            primals, cotangents = vjp.split(args)
            if all(d is None for d in primal_dims):
                if all(d is not None for d in cotangent_dims):
                    rows = _rows_first(cotangents, cotangent_dims)
                    return vjp.pull(vjp.base.graph, primals, rows, batched=True)
            elif all(primal_dims[i] is not None for i in vjp.wrt):
                return self._pull_rows(vjp, primals, cotangents)
        if isinstance(vjp, Jvp) and vjp.first_order:
            return _vmap(vjp.outermost, self.dims)(*args)
        if isinstance(vjp, UserProgram):
            return self.functional(*args)
        with torch.enable_grad():  # without it the result may be wrong, as in Jvp
            return self.functional(*args)

    def _pull_rows(self, vjp: Vjp, primals: Tensors, cotangents: Tensors) -> Tensors:
        primal_dims, cotangent_dims = vjp.split(self.dims)
        size = next(x.shape[d] for x, d in zip(primals, primal_dims, strict=True) if d is not None)
        cotangents = tuple(
            c.expand(size, *c.shape) if d is None else c.movedim(d, 0)
            for c, d in zip(cotangents, cotangent_dims, strict=True)
        )
        grads = vjp.pull(_vmap(vjp.base.functional, primal_dims), primals, cotangents)
        # A gradient has its rows where the operand has them.
        return _rows_first(grads, take(primal_dims, vjp.wrt))


class Rows(Vmap):
    """Rows calls ``f`` on every row, one row after the other inside one call.

    It serves rows with random numbers of their own: each has its key.
    """

    def functional(self, *args: Tensor) -> Tensors:
        return self._each(self.base.functional, args)

    def graph(self, *args: Tensor) -> Tensors:
        return self._each(self.base.graph, args)

    def run(self, *args: Tensor) -> Tensors:
        return self._each(self.base.run, args)

    def _each(self, f: Callable[..., Tensors], args: Tensors) -> Tensors:
        split = [None if d is None else x.unbind(d) for x, d in zip(args, self.dims, strict=True)]
        size = next(len(rows) for rows in split if rows is not None)
        out = [
            f(*(x if rows is None else rows[k] for x, rows in zip(args, split, strict=True)))
            for k in range(size)
        ]
        return tuple(torch.stack(column) for column in zip(*out, strict=True))


def _is_users(program: Any) -> bool:
    """Whether a program is the user's function or its batched form: a derivative is a first one."""
    while isinstance(program, Vmap):
        program = program.base
    return isinstance(program, UserProgram)


def _restrict(
    f: Callable[..., Tensors], primals: Tensors, wrt: Indices, of: Indices
) -> Callable[..., Tensors]:
    """Return ``f`` from the inputs ``wrt`` to the outputs ``of``; the other inputs are fixed."""

    def restricted(*xs: Tensor) -> Tensors:
        args = list(primals)
        for i, x in zip(wrt, xs, strict=True):
            args[i] = x
        return take(f(*args), of)

    return restricted


def roots_of(program: Program) -> tuple[Any, ...]:
    """Return the user's function and objects at the root of a program."""
    while program.base is not None:
        program = program.base
    assert isinstance(program, UserProgram)
    return program.roots


def _rows_first(tensors: Iterable[Tensor], dims: Iterable[Any]) -> Tensors:
    return tuple(t if d == 0 else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True))


def _vmap(f: Callable[..., Tensors], dims: Dims) -> Callable[..., Tensors]:
    """Do what ``torch.func.vmap`` does, without the pytrees that cost it 40 µs a call."""

    def batched(*args: Tensor) -> Tensors:
        size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
        with vmap_level(size) as level:
            rows = [
                x if d is None else add_batch_dim(x, d, level)
                for x, d in zip(args, dims, strict=True)
            ]
            return tuple(remove_batch_dim(y, level, size, 0) for y in f(*rows))

    return batched
