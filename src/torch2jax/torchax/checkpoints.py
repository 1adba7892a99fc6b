"""Checkpoints of training: pytrees of tensors and arrays, by orbax."""

from __future__ import annotations

import os
from typing import Any

import jax
import torch

from ..device.interop import jax_view, torch_view
from ..device.tensor import Tensor

__all__ = ["load_checkpoint", "save_checkpoint"]


def _checkpointer() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise ImportError("checkpoints need orbax: pip install orbax-checkpoint") from None
    return ocp.StandardCheckpointer()


def save_checkpoint(state: Any, path: str | os.PathLike[str]) -> None:
    """Save a pytree of tensors, arrays and numbers to a new folder.

    Args:
      state: tensors on device jax, arrays and numbers, in dicts, lists, tuples and optax's states.
      path: a folder that does not exist.

    Raises:
      TypeError: for something else in the tree, such as the generator ``model.parameters()``:
        save ``model.state_dict()``.
    """
    arrays = jax_view(state)
    for where, x in jax.tree_util.tree_leaves_with_path(arrays):
        if not isinstance(x, jax.Array | int | float) and not hasattr(x, "__array__"):
            raise TypeError(
                f"{jax.tree_util.keystr(where)} is a {type(x).__name__}, which a checkpoint cannot "
                "hold; of a model save model.state_dict()."
            )
    with _checkpointer() as saver:
        saver.save(os.path.abspath(path), jax.tree.map(jax.numpy.asarray, arrays))


def load_checkpoint(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Load what ``save_checkpoint`` saved.

    Args:
      path: its folder.
      like: a pytree of the same structure: the result has its structure (an optimizer's state is
        one again), dtypes and shardings. Without it dicts and lists come back.

    Returns:
      The tree, with tensors on device jax; with ``like`` arrays where that has arrays.
    """
    target = None if like is None else jax.tree.map(jax.numpy.asarray, jax_view(like))
    with _checkpointer() as saver:
        loaded = saver.restore(os.path.abspath(path), target)
    if like is None:
        return torch_view(jax.tree.map(jax.numpy.asarray, loaded))
    return jax.tree.map(
        lambda x, was: torch_view(x) if isinstance(was, Tensor) else x,
        loaded,
        like,
        is_leaf=lambda x: isinstance(x, torch.Tensor),
    )
