"""JAX functions take tensors and PyTorch functions take arrays, under torchax's names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from .. import device as _device
from .._compat.jax import trace_state_clean
from .._conversions.small import shown_dtype
from ..device import random_streams
from ..device.tensors.tensor import Tensor, captures, wrap
from ..device.tracing.bridged_modules import module_calls, retried
from ..device.tracing.scope import running
from .dtypes import JAX_DTYPE_TO_TORCH, t2j_dtype
from .environment import default_env

Function = Callable[..., Any]


def jax_view(tree: Any) -> Any:
    """Turn what PyTorch has in a pytree into what JAX has, without a copy.

    Tensors on device jax become arrays, PyTorch's dtypes become JAX's, and functions of tensors
    become functions of arrays.
    """
    found = _arrays(tree) if type(tree) is dict else None
    return jax.tree.map(jax_view_elem, tree) if found is None else found


def _arrays(named: dict[Any, Any]) -> dict[Any, Any] | None:
    """Return the arrays of tensors by name; None where another thing is among them.

    A module's parameters come to every call, and JAX's own walk takes three times as long.
    """
    found = {}
    plain = not captures
    for name, x in named.items():
        if not isinstance(x, Tensor):
            return None
        found[name] = x._cell.array if plain and x._chain is None else x.jax()
    return found


def jax_view_elem(x: Any) -> Any:
    """Turn one value into what JAX has, as ``jax_view`` does."""
    if isinstance(x, Tensor):
        return x.jax() if captures or x._chain is not None else x._cell.array
    if isinstance(x, _PLAIN):
        return x
    if isinstance(x, torch.dtype):
        return t2j_dtype(x)
    if isinstance(x, torch.Tensor):
        return _device.jax_view(x)  # it says what is wrong
    if callable(x) and not isinstance(x, torch.nn.Module):
        return functools.partial(call_torch, x)
    return x


def torch_view(tree: Any) -> Any:
    """Turn what JAX has in a pytree into what PyTorch has, without a copy.

    It is the inverse of ``jax_view``, except that JAX's keys stay as they are. Tensors have no
    autograd graph, and neither have results of a function that it returns: ``j2t_autograd`` gives
    a function JAX's derivative.
    """
    return jax.tree.map(torch_view_elem, tree)


def torch_view_elem(x: Any) -> Any:
    """Turn one value into what PyTorch has, as ``torch_view`` does."""
    if isinstance(x, jax.Array):
        dtype = JAX_DTYPE_TO_TORCH.get(x.dtype)
        if dtype is not None:
            return wrap(x, dtype)
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return x if is_key else wrap(x, shown_dtype(x.dtype))
    if isinstance(x, (*_PLAIN, torch.Tensor)):
        return x
    if isinstance(x, np.dtype):
        return shown_dtype(x)
    if callable(x) and not isinstance(x, torch.nn.Module):
        return functools.partial(call_jax, x)
    return x


_PLAIN = (bool, int, float, complex, str, bytes, np.ndarray, jax.Array)


def call_jax(jax_func: Function, *args: Any, **kwargs: Any) -> Any:
    """Call a JAX function with tensors on device jax, and with functions of tensors.

    PyTorch's autograd does not see the call, so results have no graph. ``j2t_autograd`` and
    ``torch2jax.device.call_jax`` give them one.
    """
    return _called(jax_func, (), args, kwargs)


def _called(fn: Function, first: tuple[Any, ...], args: Any, kwargs: Any) -> Any:
    """Call a JAX function with what ``first`` has for JAX, and then with tensors."""
    # A tree of one leaf need not be taken apart.
    given = [jax_view_elem(x) if isinstance(x, Tensor) else jax_view(x) for x in args]
    out = fn(*first, *given, **(jax_view(kwargs) if kwargs else {}))
    return torch_view_elem(out) if isinstance(out, jax.Array) else torch_view(out)


def call_torch(torch_func: Function, *args: Any, **kwargs: Any) -> Any:
    """Call a PyTorch function with arrays, tracers and functions of arrays, on device jax."""
    env = default_env()
    args, kwargs = torch_view((args, kwargs))
    if trace_state_clean():
        with env:
            return jax_view(torch_func(*args, **kwargs))
    stream = random_streams.current()
    key = None if stream is None else stream.next()
    with running(torch.get_default_dtype(), key), env.functions(), module_calls(torch_func):
        return jax_view(torch_func(*args, **kwargs))


def wrap_jax_jit(
    torch_function: Function,
    jax_jit_func: Function = jax.jit,
    kwargs_for_jax: dict[str, Any] | None = None,
) -> Function:
    """Apply a transform of JAX, with these options, to a function of tensors on device jax."""
    return torch_view(jax_jit_func(jax_view(torch_function), **(kwargs_for_jax or {})))


def jax_jit(
    torch_function: Function,
    kwargs_for_jax_jit: dict[str, Any] | None = None,
    fix_for_buffer_donation: bool = False,
) -> Function:
    """Apply ``jax.jit`` to a function of tensors on device jax that closes over none.

    Each call has random numbers of its own: their key is an argument of the program, in front of
    the others.
    """
    options = dict(kwargs_for_jax_jit or {})
    shardings = options.get("in_shardings")
    if shardings is not None:
        if not isinstance(shardings, list | tuple):  # one for all arguments
            return wrap_jax_jit(torch_function, jax.jit, options)
        options["in_shardings"] = (None, *shardings)
    for name in ("donate_argnums", "static_argnums"):
        if options.get(name) is not None:
            given = options[name]
            places = (given,) if isinstance(given, int) else tuple(given)
            options[name] = tuple(i + 1 if i >= 0 else i for i in places)

    def run(words: Any, *args: Any, **kwargs: Any) -> Any:
        with random_streams.drawing_from(words, words=True):
            return call_torch(torch_function, *args, **kwargs)

    run.__name__ = getattr(torch_function, "__name__", type(torch_function).__name__)
    compiled = jax.jit(run, **options)

    @functools.wraps(torch_function)
    def call(*args: Any, **kwargs: Any) -> Any:
        missing = random_streams.current() is None and not trace_state_clean()
        words = None if missing else random_streams.next_words()
        return retried(torch_function, lambda: _called(compiled, (words,), args, kwargs))

    return call
