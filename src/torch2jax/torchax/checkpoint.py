"""Checkpoints under torchax's names are a folder with one checkpoint for each step."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from ..device import checkpoints
from .environment import default_env

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(state: Any, path: str | os.PathLike[str], step: int | None = None) -> None:
    """Save a pytree of tensors, arrays and numbers.

    Args:
      state: tensors of any device, arrays and numbers, in dicts, lists, tuples and optax's states.
      path: a folder, where a checkpoint of the same step is replaced.
      step: the training step, 0 by default.

    Raises:
      TypeError: for something else in the tree, such as the generator ``model.parameters()``.
    """
    where = Path(path) / f"checkpoint_{0 if step is None else int(step)}"
    arrays = default_env().t2j_copy(state)
    if not where.exists():
        where.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.save_checkpoint(arrays, where)
        return
    new = where.with_name(f"new_{where.name}")
    shutil.rmtree(new, ignore_errors=True)
    checkpoints.save_checkpoint(arrays, new)
    shutil.rmtree(where)
    new.rename(where)


def load_checkpoint(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Load the last step of what ``save_checkpoint`` saved.

    Args:
      path: the folder.
      like: a pytree of the same structure: the result has its structure (an optimizer's state is
        one again), dtypes and shardings. Without it dicts and lists come back.

    Returns:
      The tree, with tensors on device jax. With ``like`` it has arrays where ``like`` has arrays.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: ``path`` is a file, such as ``torch.save`` makes.
    """
    folder = Path(path)
    if folder.is_file():
        raise ValueError(
            f"{path} is a file: load what torch.save wrote with torch.load, and move it to device "
            "jax with default_env().to_xla."
        )
    steps = [
        int(found[1])
        for p in (folder.iterdir() if folder.is_dir() else ())
        if (found := re.fullmatch(r"checkpoint_(\d+)", p.name))
    ]
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {path}")
    return checkpoints.load_checkpoint(folder / f"checkpoint_{max(steps)}", like)
