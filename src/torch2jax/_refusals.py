"""Several places refuse the same things: calls of JAX that deadlock, and symbolic shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ._compat.torch import BackwardLocal
from ._errors import SignatureError, Torch2JaxError

# --- one of several devices ----------------------------------------------------------------------


_one_of_several = BackwardLocal(f"{__name__.partition('.')[0]}: one of several devices")


def on_one_of_several(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run`` on a thread that knows that its program runs on several devices at once."""

    def call(*args: Any) -> Any:
        before = _one_of_several.get()
        _one_of_several.set(True)
        try:
            return run(*args)
        finally:
            _one_of_several.set(before)

    return call


def check_may_call_jax(what: str) -> None:
    """Raise inside a call that runs on one of several devices: calling JAX there deadlocks.

    Devices wait for each other in a collective, and what is called waits for a device.
    """
    if _one_of_several.get():
        raise Torch2JaxError(
            f"{what} is called inside a torch2jax function that runs on several devices at once. "
            "Calling JAX from there deadlocks when the devices wait for each other: make the JAX "
            "call outside, or compose the functions in JAX."
        )


# --- forked processes ----------------------------------------------------------------------------


def refuse_forked(*_: Any, **__: Any) -> Any:
    """Raise in a forked process, where JAX's threads are missing; it takes the place of a call."""
    raise Torch2JaxError(
        "a torch2jax function is called in a process made by os.fork(), in which the threads of "
        "JAX and PyTorch do not exist and their locks may be held for ever. Start processes by "
        'multiprocessing.get_context("spawn") or "forkserver".'
    )


# --- symbolic shapes -----------------------------------------------------------------------------


def refuse_symbolic(shape: Iterable[Any], what: str) -> None:
    """Raise where a size of ``what`` is a symbol of ``jax.export`` in place of a number."""
    if not all(isinstance(n, int) for n in shape):
        raise SignatureError(
            f"{what} has the symbolic shape {shape}, and PyTorch code needs sizes that are "
            "numbers: trace or export it with concrete shapes, once for each size."
        )
