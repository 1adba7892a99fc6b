"""A JAX model becomes a ``torch.nn.Module``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.tree_util import tree_flatten_with_path

from .._bridge.calls.names import label_of
from .._conversions.convert import j2t, t2j
from .._errors import SignatureError
from .function import jax2torch


def jax_module(
    apply: Callable[..., Any],
    params: Any,
    *,
    trainable: Callable[[str], bool] | None = None,
    **options: Any,
) -> JaxModule:
    """Make a ``torch.nn.Module`` of a JAX model, for PyTorch's optimizers to train.

    Args:
      apply: ``apply(params, *args, **kwargs)``, a function that ``jax2torch`` takes.
      params: the pytree of its parameters: Flax variables, an ``nnx.State``, an Equinox model, any
        tree. Its floating and complex arrays are copied into ``nn.Parameter``s, its integer and
        bool arrays into buffers; every other leaf (functions, numbers, random keys) is a constant.
        In ``state_dict`` their names are their paths in the tree: ``params.Dense_0.kernel``.
      trainable: says of a name whether it is a parameter; the others are buffers, without a
        gradient. An example is ``lambda name: not name.startswith("batch_stats")``.
      **options: options of ``jax2torch``; ``static_argnums`` and ``nondiff_argnums`` count from the
        first argument after ``params``.

    Returns:
      A module; ``module(*args, **kwargs)`` is ``apply`` with its tensors as ``params``. Its
      ``to_jax()`` is that tree, of arrays. It is moved, cast, copied, saved and loaded like any
      other module.

    Raises:
      SignatureError: if no leaf of ``params`` is an array, or two have one name.

    >>> import jax.numpy as jnp, torch
    >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    >>> linear = jax_module(lambda p, x: x @ p["w"] + p["b"], params)
    >>> linear(torch.ones(1, 3))
    tensor([[3., 3.]], grad_fn=<DirectBackward>)
    >>> sorted(linear.state_dict())
    ['b', 'w']
    """
    return JaxModule(apply, params, trainable, options)


class JaxModule(torch.nn.Module):
    """A ``JaxModule`` is a JAX model as a module; ``jax_module`` makes it."""

    def __init__(
        self,
        apply: Callable[..., Any],
        params: Any,
        trainable: Callable[[str], bool] | None,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        leaves, treedef = tree_flatten_with_path(params)
        constants: dict[int, Any] = {}
        self._spots: list[tuple[torch.nn.Module, str]] = []
        for i, (path, x) in enumerate(leaves):
            if _is_array(x):
                self._spots.append(self._place([*map(_word, path)] or ["value"], x, trainable))
            else:
                constants[i] = x
        if not self._spots:
            raise SignatureError(
                f"params of jax_module, a {type(params).__name__}, has no leaf that is an array."
            )
        self._applied = _Applied(apply, treedef, constants)
        self._function = jax2torch(self._applied, **_behind_params(options))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._tensors(), *args, **kwargs)

    def to_jax(self) -> Any:
        """Return the tree of parameters for ``apply``: copies of them, and the constants."""
        return self._applied.tree([t2j(x.detach().clone()) for x in self._tensors()])

    def _tensors(self) -> list[torch.Tensor]:
        return [getattr(owner, name) for owner, name in self._spots]

    def _place(
        self, words: list[str], x: Any, trainable: Callable[[str], bool] | None
    ) -> tuple[torch.nn.Module, str]:
        """Make the tensor of a leaf; return the module that holds it, and its name there."""
        # NumPy's float64 is float32 while x64 is off, as JAX itself would take it.
        tensor = x.detach().clone() if isinstance(x, torch.Tensor) else j2t(jnp.asarray(x)).clone()
        inexact = tensor.is_floating_point() or tensor.is_complex()
        is_parameter = inexact and (trainable is None or trainable(".".join(words)))
        owner: torch.nn.Module = self
        for word in words[:-1]:
            word = _free(owner, word, owner._modules)
            if word not in owner._modules:
                owner.add_module(word, _Branch())
            owner = owner.get_submodule(word)
        last = _free(owner, words[-1], {})
        if is_parameter:
            owner.register_parameter(last, torch.nn.Parameter(tensor))
        else:
            owner.register_buffer(last, tensor)
        return owner, last


class _Branch(torch.nn.Module):
    """A branch is an inner node of the tree of parameters."""


class _Applied:
    """``_Applied`` is ``apply`` as a function of the arrays among the leaves of its parameters."""

    def __init__(self, apply: Callable[..., Any], treedef: Any, constants: dict[int, Any]) -> None:
        self._apply, self._treedef, self._constants = apply, treedef, constants
        self.__name__ = getattr(apply, "__name__", type(apply).__name__)
        self.__qualname__ = label_of(apply)

    def __call__(self, arrays: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        return self._apply(self.tree(arrays), *args, **kwargs)

    def tree(self, arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        n = self._treedef.num_leaves
        constants = self._constants
        return self._treedef.unflatten(
            [constants[i] if i in constants else next(rest) for i in range(n)]
        )


def _is_array(x: Any) -> bool:
    if isinstance(x, jax.Array):
        return not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return isinstance(x, (torch.Tensor, np.ndarray))


def _word(key: Any) -> str:
    """Return a key of a path as a part of a name."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute)).replace(".", "_") or "_"
    return str(key).replace(".", "_")


def _free(owner: torch.nn.Module, word: str, known: Any) -> str:
    """Return the word, or another one where the module has such an attribute already."""
    while hasattr(owner, word) and word not in known:
        word += "_"
    return word


def _behind_params(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of ``jax2torch`` whose positions count ``params``, too."""
    shifted = dict(options)
    for option in ("static_argnums", "nondiff_argnums"):
        nums = options.get(option)
        if nums is not None:
            nums = (nums,) if isinstance(nums, int) else tuple(nums)
            shifted[option] = tuple(i + 1 if i >= 0 else i for i in nums)
    return shifted
