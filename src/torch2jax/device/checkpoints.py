"""Orbax stores pytrees of tensors and arrays as checkpoints, and safetensors stores weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import torch

from .._conversions.float64 import admit
from .._errors import SignatureError
from .interop import jax_view, torch_view
from .setup.enable import enable
from .tensors.tensor import Tensor, from_torch, read, to_torch, wrap

__all__ = ["load_checkpoint", "save_checkpoint"]

WEIGHTS = ".safetensors"


def save_checkpoint(state: Any, path: str | os.PathLike[str]) -> None:
    """Save a pytree of tensors, arrays and numbers.

    Args:
      state: tensors on device "jax", arrays and numbers, in dicts, lists, tuples and optax's
        states. A path that ends in ``.safetensors`` takes ``{name: tensor or array}``, such as a
        ``state_dict``.
      path: a folder that does not exist, or a file ``*.safetensors``. Orbax writes the folder,
        where sharded arrays are stored by shards. Other libraries read the file as well.

    Raises:
      SignatureError: for something else in the tree, such as the generator ``model.parameters()``:
        save ``model.state_dict()``.
      ImportError: the library is not installed.

    >>> import tempfile, torch, torch2jax
    >>> model = torch.nn.Linear(2, 3).to("jax")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch2jax.device.save_checkpoint(model.state_dict(), f"{folder}/m.safetensors")
    ...     sorted(torch2jax.device.load_checkpoint(f"{folder}/m.safetensors"))
    ['bias', 'weight']
    """
    path = os.path.abspath(path)
    if path.endswith(WEIGHTS):
        _safetensors().save_file(_weights(state), path)
        return
    arrays = jax_view(state)
    for where, x in jax.tree_util.tree_leaves_with_path(arrays):
        if not isinstance(x, jax.Array | int | float) and not hasattr(x, "__array__"):
            raise SignatureError(
                f"state{jax.tree_util.keystr(where)} is a {type(x).__name__}, which a checkpoint "
                "cannot hold; of a model save model.state_dict()."
            )
    with _orbax().StandardCheckpointer() as saver:
        saver.save(path, jax.tree.map(jax.numpy.asarray, arrays))


def load_checkpoint(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Load what ``save_checkpoint`` saved, or a file of safetensors from elsewhere.

    Args:
      path: its folder or file.
      like: a pytree of the same structure: the result has its structure (an optimizer's state is
        one again), dtypes and shardings; each device reads its shards only. Without it dicts and
        lists come back.

    Returns:
      The tree, with tensors on device "jax". With ``like`` it has arrays where ``like`` has arrays.

    Raises:
      SignatureError: ``like`` has other names or shapes than a file of safetensors.
      ImportError: the library is not installed.

    >>> import tempfile, torch, torch2jax
    >>> torch2jax.device.enable()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     state = {"weight": torch.arange(3.0, device="jax"), "step": 7}
    ...     torch2jax.device.save_checkpoint(state, f"{folder}/7")
    ...     torch2jax.device.load_checkpoint(f"{folder}/7", like=state)["weight"].tolist()
    [0.0, 1.0, 2.0]
    """
    enable()
    path = os.path.abspath(path)
    if path.endswith(WEIGHTS):
        found: dict[str, torch.Tensor] = _safetensors().load_file(path)
        if like is None:
            for dtype in {x.dtype for x in found.values()}:
                admit(dtype)
            return {name: wrap(from_torch(x), x.dtype) for name, x in found.items()}
        return {name: _as(name, found.get(name), like.get(name)) for name in {**found, **like}}
    target = None if like is None else jax.tree.map(jax.numpy.asarray, jax_view(like))
    with _orbax().StandardCheckpointer() as saver:
        loaded = saver.restore(path, target)
    if like is None:
        return torch_view(jax.tree.map(jax.numpy.asarray, loaded))
    return jax.tree.map(
        lambda x, was: wrap(x, was.dtype) if isinstance(was, Tensor) else x,
        loaded,
        like,
        is_leaf=lambda x: isinstance(x, torch.Tensor),
    )


def _weights(state: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    if not isinstance(state, Mapping):
        raise SignatureError(f"{WEIGHTS} holds a dict of tensors, got {type(state).__name__}.")
    for name, x in state.items():
        if isinstance(x, jax.Array):
            x = torch_view(x)
        if not isinstance(x, torch.Tensor):
            raise SignatureError(f"{WEIGHTS} holds tensors, {name!r} is a {type(x).__name__}.")
        x = x.detach()
        # Tied weights are stored once for each name, because the format has no sharing.
        found[name] = to_torch(x) if isinstance(x, Tensor) else x.clone().contiguous()
    return found


def _as(name: str, x: torch.Tensor | None, like: Any) -> Any:
    if x is None or like is None or tuple(x.shape) != tuple(like.shape):
        there = "nothing" if x is None else f"shape {tuple(x.shape)}"
        asked = "nothing" if like is None else f"shape {tuple(like.shape)}"
        raise SignatureError(f"the file has {there} for {name!r}, like= has {asked}.")
    array = read(like) if isinstance(like, Tensor) else like
    new = jax.device_put(from_torch(x).astype(array.dtype), array.sharding)
    return wrap(new, like.dtype) if isinstance(like, Tensor) else new


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise ImportError("checkpoints need orbax: pip install orbax-checkpoint") from None
    return ocp


def _safetensors() -> Any:
    try:
        import safetensors.torch as safetensors
    except ImportError:
        raise ImportError("*.safetensors needs safetensors: pip install safetensors") from None
    return safetensors
