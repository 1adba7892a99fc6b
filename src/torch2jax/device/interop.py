"""PyTorch programs call JAX functions, and JAX programs PyTorch's, on the same arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import torch
from jax.core import Tracer

from .._conversions.dtypes import dtype_j2t
from .._errors import SignatureError
from .operators.jax_function import apply_jax
from .setup.enable import enable
from .tensors.tensor import Tensor, wrap
from .tracing.scope import running

__all__ = [
    "call_jax",
    "call_torch",
    "checkpoint",
    "jax_view",
    "torch_view",
    "value_and_grad",
]


def jax_view(tree: Any) -> Any:
    """Return the arrays of tensors on device "jax", or a function of tensors as one of arrays.

    Args:
      tree: a pytree or a callable. Leaves of a pytree that are tensors on device "jax" become
        arrays without a copy; other leaves stay.

    Returns:
      The same structure. For a callable it is a function that takes and returns arrays.

    Raises:
      SignatureError: for a tensor on another device.

    >>> import torch, torch2jax
    >>> torch2jax.device.enable()
    >>> torch2jax.device.jax_view({"w": torch.ones(2, device="jax")})
    {'w': Array([1., 1.], dtype=float32)}
    """
    if callable(tree) and not torch.is_tensor(tree):
        return lambda *args, **kwargs: call_torch(tree, *args, **kwargs)
    return jax.tree.map(_array, tree, is_leaf=torch.is_tensor)


def _array(x: Any) -> Any:
    if not torch.is_tensor(x):
        return x
    if not isinstance(x, Tensor):
        raise SignatureError(f'a tensor on {x.device} is not on device jax: use tensor.to("jax").')
    return x.jax()


def torch_view(tree: Any) -> Any:
    """Return arrays as tensors on device "jax", or a function of arrays as one of tensors.

    It is the inverse of ``jax_view`` and makes no copy. A function that it returns has JAX's
    gradients.

    >>> import jax.numpy as jnp, torch2jax
    >>> sin = torch2jax.device.torch_view(jnp.sin)
    >>> sin(torch2jax.device.tensor(jnp.zeros(2)))
    tensor([0., 0.], device='jax:0')
    """
    if callable(tree) and not isinstance(tree, jax.Array):
        return lambda *args, **kwargs: call_jax(tree, *args, **kwargs)
    return jax.tree.map(lambda x: tensor(x) if isinstance(x, jax.Array) else x, tree)


def call_jax(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a JAX function with tensors on device "jax".

    Args:
      fn: a function that takes and returns pytrees of arrays.
      *args: pytrees of tensors on device "jax", and of whatever ``fn`` takes besides.
      **kwargs: the same by keyword.

    Returns:
      What ``fn`` returns, with tensors for arrays, without a copy. ``backward()`` goes through it
      with JAX's derivative.

    Raises:
      SignatureError: for a tensor on another device.

    >>> import torch, torch2jax, jax.numpy as jnp
    >>> torch2jax.device.enable()
    >>> x = torch.ones(2, device="jax", requires_grad=True)
    >>> torch2jax.device.call_jax(jnp.square, x).sum().backward()
    >>> x.grad
    tensor([2., 2.], device='jax:0')
    """
    enable()
    leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=torch.is_tensor)
    places = [i for i, x in enumerate(leaves) if torch.is_tensor(x)]
    for i in places:
        _array(leaves[i])

    def flat(arrays: Any) -> Any:
        full = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            full[i] = x
        inner, named = structure.unflatten(full)
        return fn(*inner, **named)

    return apply_jax(flat, [leaves[i] for i in places])


def call_torch(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a PyTorch function with arrays or tracers, so that it runs on device "jax".

    Args:
      fn: a function that takes and returns pytrees of tensors.
      *args: pytrees of arrays, and of whatever ``fn`` takes besides.
      **kwargs: the same by keyword.

    Returns:
      What ``fn`` returns, with arrays for tensors, without a copy. Any transform of JAX can trace
      the call. ``torch2jax(fn, lower=True)`` does the same in a compiled function.

    >>> import torch, torch2jax, jax, jax.numpy as jnp
    >>> jax.grad(lambda x: torch2jax.device.call_torch(torch.sin, x).sum())(jnp.zeros(2))
    Array([1., 1.], dtype=float32)
    """
    enable()
    given = jax.tree.map(lambda x: tensor(x) if isinstance(x, jax.Array) else x, (args, kwargs))
    inner, named = given
    traced = any(isinstance(x, Tracer) for x in jax.tree.leaves((args, kwargs)))
    if not traced:
        return jax_view(fn(*inner, **named))
    from . import random_streams

    stream = random_streams.current()
    with running(torch.get_default_dtype(), None if stream is None else stream.next()):
        return jax_view(fn(*inner, **named))


def value_and_grad(fn: Callable[..., Any], argnums: Any = 0, has_aux: bool = False) -> Any:
    """Apply ``jax.value_and_grad`` to a function of tensors on device "jax".

    Args:
      fn: a function that takes pytrees of tensors and returns a 0-d tensor. With ``has_aux`` it
        returns a pair of that and something else.
      argnums: positions of the arguments whose gradients are wanted.
      has_aux: as in JAX.

    Returns:
      A function of the same arguments that returns the value and gradients as tensors.

    >>> import torch, torch2jax
    >>> torch2jax.device.enable()
    >>> f = torch2jax.device.value_and_grad(lambda p: (p["w"] ** 2).sum())
    >>> value, grads = f({"w": torch.ones(2, device="jax")})
    >>> grads["w"]
    tensor([2., 2.], device='jax:0')
    """
    inner = jax.value_and_grad(jax_view(fn), argnums, has_aux)
    return lambda *args, **kwargs: torch_view(inner(*jax_view(args), **jax_view(kwargs)))


def checkpoint(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Apply ``jax.checkpoint``: the backward pass runs the function again, and nothing is kept.

    Args:
      fn: a function that takes and returns pytrees of tensors on device "jax".
      **options: options of ``jax.checkpoint``.

    Returns:
      A function that computes the same.

    >>> import torch, torch2jax
    >>> torch2jax.device.enable()
    >>> x = torch.ones(2, device="jax", requires_grad=True)
    >>> torch2jax.device.checkpoint(torch.sin)(x).sum().backward()
    >>> x.grad
    tensor([0.5403, 0.5403], device='jax:0')
    """
    inner = jax.checkpoint(jax_view(fn), **options)
    return lambda *args, **kwargs: call_jax(inner, *args, **kwargs)


def tensor(array: Any, requires_grad: bool = False) -> Tensor:
    """Return a JAX array, or tracer, as a tensor on device "jax", without a copy.

    In-place operations on the tensor leave the array as it is.

    Args:
        array: a ``jax.Array`` of a dtype that PyTorch has, on any device, sharded or not. Inside a
            traced function it may be a tracer.
        requires_grad: as in ``torch.tensor``.

    Returns:
        A tensor of the same shape and dtype.

    Raises:
        SignatureError: ``array`` is not a JAX array.
        UnsupportedDtypeError: PyTorch has no such dtype.

    >>> import jax.numpy as jnp, torch2jax
    >>> torch2jax.device.enable()
    >>> x = torch2jax.device.tensor(jnp.arange(3.0))
    >>> (x * 2).jax()
    Array([0., 2., 4.], dtype=float32)
    """
    if not isinstance(array, jax.Array):
        raise SignatureError(
            f"device.tensor takes a jax.Array, got {type(array).__name__}; torch.tensor(..., "
            'device="jax") and tensor.to("jax") take the rest.'
        )
    enable()
    t = wrap(array, dtype_j2t(array.dtype))
    if requires_grad:
        t.requires_grad_()
    return t
