"""JAX's derivative calls hooks on gradients, under ``lower=True`` and ``device.jit``.

A hook stands at a value whose gradient it sees and may replace. There the value becomes the result
of an identity whose derivative, in reverse mode alone, calls the hook. Hooks run while JAX traces
the derivative, so the gradients that they see are traced.

NOTE [Backward hooks of modules]. A full backward hook sees the gradients of a call's results and
of its inputs. So there are two identities. The one at the results notes their gradients. JAX's
derivative reaches the one at the inputs later, and that one calls the hooks with both.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch
from jax.core import Tracer
from torch.utils.hooks import RemovableHandle

from ..._compat.jax import get_opaque_trace_state
from ..._compat.torch import BackwardHook, module_calls
from ..._errors import Torch2JaxError
from ..operators.constants import value_of
from ..setup.changes_of_pytorch import replace_while_tracing
from ..tensors.tensor import Tensor, recorded, wrap, write
from ..thread_state import state

__all__ = ["apply_hooks"]


def _is_traced(x: Any) -> bool:
    return (
        type(x) is Tensor
        and state.lowering > 0
        and isinstance(x._cell.array, Tracer)
        and (x.is_floating_point() or x.is_complex())
    )


def _identity(
    arrays: Sequence[Any], dtypes: Sequence[torch.dtype], pull: Callable[[list[Any]], Sequence[Any]]
) -> list[Any]:
    """Return the same arrays. ``pull`` takes and returns their gradients in PyTorch's sense."""
    resume = state.resume

    @jax.custom_vjp
    def same(*arrays: Any) -> list[Any]:
        return list(arrays)

    def backward(_: Any, cotangents: Sequence[Any]) -> tuple[Any, ...]:
        with resume():
            # PyTorch's gradients of complex values are the conjugates of JAX's.
            given = [wrap(ct.conj(), d) for ct, d in zip(cotangents, dtypes, strict=True)]
            found = [value_of(g).conj() for g in pull(given)]
        return tuple(g.astype(ct.dtype) for g, ct in zip(found, cotangents, strict=True))

    same.defvjp(lambda *arrays: (same(*arrays), None), backward)
    return same(*arrays)


def _replacement(old: Any, new: Any, what: str) -> Any:
    """Return the gradient after a hook, which returns another one or nothing."""
    if new is None:
        return old
    if not isinstance(new, Tensor) or new.shape != old.shape:
        got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise Torch2JaxError(
            f"{what} has to return a gradient of shape {tuple(old.shape)} or None, got {got}."
        )
    return new


# --- hooks of tensors ----------------------------------------------------------------------------


def _register_hook(self: Tensor, hook: Callable[[Any], Any]) -> RemovableHandle:
    theirs = torch.Tensor.register_hook(self, hook) if recorded(self) else None
    if not _is_traced(self):
        return theirs if theirs is not None else torch.Tensor.register_hook(self, hook)
    known = self._hooks
    if known is None or known[1:] != (self._cell, self._cell.version):
        # PyTorch calls the hooks of one value in their order. A write makes it another value.
        hooks: OrderedDict[int, Any] = OrderedDict()
        write(self, _identity([value_of(self)], [self.dtype], _all_of(hooks))[0])
        known = self._hooks = (hooks, self._cell, self._cell.version)
    handle = _Handles(known[0], theirs)
    known[0][handle.id] = hook
    return handle


def _all_of(hooks: OrderedDict[int, Any]) -> Any:
    def pull(gradients: list[Any]) -> list[Any]:
        (g,) = gradients
        for hook in hooks.values():
            g = _replacement(g, hook(g), "a hook of a tensor")
        return [g]

    return pull


class _Handles(RemovableHandle):
    """A handle removes a hook from JAX's derivative, and from PyTorch's where both are at work."""

    def __init__(self, hooks: Any, theirs: RemovableHandle | None) -> None:
        super().__init__(hooks)
        self.theirs = theirs

    def remove(self) -> None:
        super().remove()
        if self.theirs is not None:
            self.theirs.remove()


def _refused(name: str, remedy: str) -> Callable[..., Any]:
    def method(self: Tensor, *args: Any) -> Any:
        if _is_traced(self) and not recorded(self):
            raise Torch2JaxError(
                f"{name} of a tensor that is being traced: JAX takes the derivative, and nothing "
                f"accumulates in grad. {remedy}"
            )
        return getattr(torch.Tensor, name)(self, *args)

    return method


for _name, _method in (
    ("register_hook", _register_hook),
    (
        "register_post_accumulate_grad_hook",
        _refused(
            "register_post_accumulate_grad_hook",
            "Use the gradients that jax.grad returns, or register_hook.",
        ),
    ),
    (
        "retain_grad",
        _refused("retain_grad", "Make the tensor an argument, and ask jax.grad for it."),
    ),
):
    setattr(Tensor, _name, _method)


def apply_hooks(source: torch.Tensor, target: torch.Tensor) -> None:
    """Give the hooks of a module's parameter ``source`` to ``target``, which stands for it."""
    if getattr(source, "_post_accumulate_grad_hooks", None):
        raise Torch2JaxError(
            "a parameter has a hook of register_post_accumulate_grad_hook, which under lower=True "
            "would never run: JAX takes the derivative, and nothing accumulates in grad. Remove "
            "it, and use the gradients that jax.grad returns."
        )
    for hook in list((source._backward_hooks or {}).values()):
        target.register_hook(hook)


# --- hooks of modules ----------------------------------------------------------------------------


class _TracedBackwardHook(BackwardHook):
    """It calls the backward hooks of one call of a module."""

    traced = False
    places: list[int]
    gradients: Any = None
    trace: Any = None

    def setup_input_hook(self, args: Any) -> Any:
        args = super().setup_input_hook(args)
        self.count_in = len(args)
        self.places = [i for i, x in enumerate(args) if _is_traced(x)]
        if not self.places or not self.user_hooks:
            return args
        given = [args[i] for i in self.places]
        made = _identity([value_of(x) for x in given], [x.dtype for x in given], self._at_inputs)
        full = list(args)
        for i, x, a in zip(self.places, given, made, strict=True):
            full[i] = _like(x, a)
        return tuple(full)

    def setup_output_hook(self, args: Any) -> Any:
        args = super().setup_output_hook(args)
        single = not isinstance(args, tuple)
        outs = [args] if single else list(args)
        self.count_out = len(outs)
        self.places_out = [i for i, x in enumerate(outs) if _is_traced(x)]
        if self.places_out:
            given = [outs[i] for i in self.places_out]
            arrays = [value_of(x) for x in given]
            made = _identity(arrays, [x.dtype for x in given], self._at_results)
            for i, x, a in zip(self.places_out, given, made, strict=True):
                outs[i] = _like(x, a)
        return outs[0] if single else tuple(outs)

    def _at_results(self, gradients: list[Any]) -> list[Any]:
        full = _beside_none(gradients, self.places_out, self.count_out)
        for hook in self.user_pre_hooks:
            new = hook(self.module, full)
            if new is not None:
                new = new if isinstance(new, tuple) else (new,)
                full = self._checked(full, new, "a full backward pre hook")
        self.gradients, self.trace = full, get_opaque_trace_state()
        if not self.places:  # hooks are called here where no input has a gradient
            for hook in self.user_hooks:
                if hook(self.module, (None,) * self.count_in, full) is not None:
                    raise Torch2JaxError(
                        "a full backward hook of a module none of whose inputs has a gradient has "
                        "to return None."
                    )
        return [full[i] for i in self.places_out]

    def _at_inputs(self, gradients: list[Any]) -> list[Any]:
        if self.gradients is None or self.trace != get_opaque_trace_state():
            raise Torch2JaxError(
                f"the full backward hook of {type(self.module).__name__} needs the gradients of "
                "the call's results, which JAX computes in another trace (jax.vmap of a gradient, "
                "or a result that is not used). Use register_full_backward_pre_hook, or hooks of "
                "tensors."
            )
        full = _beside_none(gradients, self.places, self.count_in)
        for hook in self.user_hooks:
            new = hook(self.module, full, self.gradients)
            if new is not None:
                new = new if isinstance(new, tuple) else (new,)
                full = self._checked(full, new, "a full backward hook")
        return [full[i] for i in self.places]

    @staticmethod
    def _checked(old: Any, new: Any, what: str) -> Any:
        if len(new) != len(old):
            raise Torch2JaxError(f"{what} has to return {len(old)} gradients, got {len(new)}.")
        pairs = zip(old, new, strict=True)
        return tuple(None if o is None else _replacement(o, n, what) for o, n in pairs)


def _beside_none(found: Sequence[Any], places: Sequence[int], count: int) -> tuple[Any, ...]:
    full: list[Any] = [None] * count
    for i, g in zip(places, found, strict=True):
        full[i] = g
    return tuple(full)


def _like(x: Tensor, array: Any) -> Tensor:
    """Return a tensor of these values at the place of ``x`` in PyTorch's graph, if it has one."""
    new: Any = x.view_as(x) if recorded(x) else wrap(array, x.dtype)
    if recorded(x):
        new._cell, new._chain, new._memo = type(x._cell)(array), None, None
    return new


def _backward_hook(module: Any, hooks: Any, pre_hooks: Any) -> Any:
    made = _TracedBackwardHook if state.lowering else BackwardHook
    return made(module, hooks, pre_hooks)


replace_while_tracing(module_calls, "BackwardHook", _backward_hook)
