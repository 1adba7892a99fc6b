"""An environment holds a default device, random numbers and overridden operators."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from .. import device as _device
from .._conversions.convert import j2t
from .._conversions.float64 import admit
from .._conversions.small import shown_dtype, widened
from ..device import random_streams
from ..device.tensors.tensor import Tensor, from_torch, read, wrap
from .config import Configuration
from .modes import XLADispatchMode, XLAFunctionMode
from .promotions import narrowed, on_jax, promoted
from .registry import Operator, OperatorNotFound, Operators

__all__ = ["Environment", "Properties", "default_env", "words_of"]


class Properties(NamedTuple):
    """``Environment.param`` returns these properties of the calling thread."""

    mesh: Any
    prng: Any
    autocast_dtype: torch.dtype | None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.entered: list[Any] = []
        self.mesh: Any = None
        self.key: tuple[Any, Any] | None = None
        """The key that ``prng_key`` was set to, and the state of the generator that it left."""


class Environment(contextlib.ContextDecorator):
    """An environment holds how PyTorch's functions behave within it, and random numbers.

    PyTorch's default device stays what it is. ``default_env`` is the process's environment.

    Args:
      configuration: the settings, by default a fresh ``Configuration``.

    >>> import torch, torch2jax.torchax as torchax
    >>> with torchax.default_env():
    ...     torch.ones(2, device="jax")
    tensor([1., 1.], device='jax:0')
    """

    def __init__(self, configuration: Configuration | None = None) -> None:
        _device.enable()
        self.config = configuration or Configuration()
        self._definitions: dict[Any, Callable[..., Any]] = {}
        self._ops = self._decomps = Operators(self, self._definitions)
        self._function_mode = XLAFunctionMode(self)
        self._dispatch_mode = XLADispatchMode(self)
        self._thread = _Thread()

    # --- the environment as a context

    @property
    def enabled(self) -> bool:
        """Say whether this thread is in the environment."""
        return bool(self._thread.entered)

    def __enter__(self) -> Environment:
        stack = contextlib.ExitStack()
        stack.enter_context(self.functions())
        if self.config.debug_print_each_op:
            stack.enter_context(XLADispatchMode(self))
        self._thread.entered.append(stack)
        return self

    def __exit__(self, *error: Any) -> None:
        self._thread.entered.pop().__exit__(*error)

    def enable_torch_modes(self) -> None:
        """Enter the environment as ``with`` does, until ``disable_torch_modes``."""
        self.__enter__()

    def disable_torch_modes(self, *error: Any) -> None:
        """Leave the environment, if this thread is in it."""
        if self._thread.entered:
            self.__exit__(*(error or (None, None, None)))

    def leave(self) -> int:
        """Leave the environment entirely; return how often it was entered."""
        depth = len(self._thread.entered)
        for _ in range(depth):
            self.__exit__(None, None, None)
        return depth

    # --- operators

    def override_op_definition(
        self, op_to_override: Any, op_impl: Callable[..., Any], is_view_op: bool = False
    ) -> None:
        """Use a function of tensors for an operator or a function of PyTorch.

        Args:
          op_to_override: an operator of ``torch.ops``, or a function such as
            ``torch.nn.functional.scaled_dot_product_attention``. An operator is overridden from
            now on for all tensors on device jax. A function is overridden within ``with env``,
            after ``enable_globally()``, and in what ``interop`` compiles.
          op_impl: a function that takes and returns what the overridden one does. The derivative of
            an operator stays PyTorch's. That of a function is the derivative of ``op_impl``.
          is_view_op: has no effect: results share memory where ``op_impl`` makes them share it.
        """
        self._ops[op_to_override] = Operator(
            op_to_override, op_impl, False, True, False, is_view_op
        )

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call one of PyTorch's functions as torchax does.

        A user's definition replaces a function, device "cuda" means jax where the configuration
        says so, what PyTorch refuses is promoted, and a new tensor has its array's floating dtype;
        see ``promotions``.
        """
        kwargs = kwargs or {}
        definition = self._definitions.get(func)
        if definition is not None:
            return definition(*args, **kwargs)
        if self.config.treat_cuda_as_jax_device:
            func, args, kwargs = on_jax(func, args, kwargs)
        args, kwargs = promoted(func, args, kwargs, self.config)
        return narrowed(func(*args, **kwargs), args, kwargs)

    def _get_op_or_decomp(self, func: Any) -> Operator:
        try:
            return self._ops[func]
        except KeyError:
            raise OperatorNotFound(f"{func} is no operator, and is not overridden") from None

    @contextlib.contextmanager
    def functions(self) -> Iterator[None]:
        """Let PyTorch's functions be those of the environment in this context.

        Functions under ``torch.compile`` run as they are, in the whole process.
        """
        with contextlib.ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # loading it takes seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(XLAFunctionMode(self))
            yield

    # --- random numbers and other properties

    @property
    def prng_key(self) -> jax.Array:
        """Return the key from which the next draw of this thread follows."""
        stream = random_streams.current()
        if stream is not None:
            # A key that is given is the next one, until a draw has been made from it.
            return jax.random.fold_in(stream.key, stream.count) if stream.count else stream.key
        before = random_streams.get_state()
        given = self._thread.key
        if given is not None and torch.equal(given[1], before):
            return given[0]
        words = random_streams.next_words()
        random_streams.set_state(before)
        return jax.random.wrap_key_data(words)

    @prng_key.setter
    def prng_key(self, key: Any) -> None:
        key = words_of(key)
        stream = random_streams.current()
        if stream is not None:
            stream.key, stream.count = jax.random.wrap_key_data(key), 0
            return
        high, low = (int(x) for x in np.asarray(key)[-2:])
        random_streams.seed(high << 32 | low)
        self._thread.key = jax.random.wrap_key_data(key), random_streams.get_state()

    def get_and_rotate_prng_key(self, generator: torch.Generator | None = None) -> jax.Array:
        """Return a key that has not been used."""
        return jax.random.wrap_key_data(random_streams.next_words(generator))

    def manual_seed(self, key: Any) -> None:
        """Seed what is drawn on device jax.

        In a compiled function it seeds the rest of that function.

        Args:
          key: an integer, or a 0-d integer tensor or array.
        """
        stream = random_streams.current()
        if stream is None:
            torch.manual_seed(int(key))
            return
        value = read(key) if isinstance(key, Tensor) else int(key)
        stream.key, stream.count = jax.random.key(value), 0

    @property
    def param(self) -> Properties:
        """Return the mesh, key and autocast's dtype of this thread."""
        autocast = torch.is_autocast_enabled("jax")
        dtype = torch.get_autocast_dtype("jax") if autocast else None
        return Properties(self._thread.mesh, self.prng_key, dtype)

    @contextlib.contextmanager
    def override_property(self, **properties: Any) -> Iterator[None]:
        """Set ``mesh``, ``prng`` (a key) or ``autocast_dtype`` in this context and thread."""
        unknown = set(properties) - set(Properties._fields)
        if unknown:
            raise TypeError(f"override_property knows {Properties._fields}, not {sorted(unknown)}")
        with contextlib.ExitStack() as stack:
            if "prng" in properties:
                stack.enter_context(
                    random_streams.drawing_from(words_of(properties["prng"]), words=True)
                )
            if "autocast_dtype" in properties:
                dtype = properties["autocast_dtype"]
                on = dtype is not None
                stack.enter_context(torch.autocast("jax", dtype or torch.bfloat16, enabled=on))
            before = self._thread.mesh
            self._thread.mesh = properties.get("mesh", before)
            try:
                yield
            finally:
                self._thread.mesh = before

    # --- conversions

    def to_xla(self, tree: Any) -> Any:
        """Move tensors and modules of a pytree to device jax; a module moves in place."""

        def move(x: Any) -> Any:
            if isinstance(x, torch.nn.Module):
                return x.to("jax")
            if isinstance(x, torch.Tensor) and not isinstance(x, Tensor):
                return x.detach().to("jax")
            return x

        return jax.tree.map(move, tree, is_leaf=torch.is_tensor)

    def t2j_iso(self, tree: Any) -> Any:
        """Return the arrays of tensors on device jax."""
        return _device.jax_view(tree)

    def j2t_iso(self, tree: Any) -> Any:
        """Return arrays as tensors on device jax."""
        return jax.tree.map(
            lambda x: wrap(x, shown_dtype(x.dtype)) if isinstance(x, jax.Array) else x, tree
        )

    def t2j_copy(self, tree: Any) -> Any:
        """Return tensors of any device as arrays."""

        def array(x: Any) -> Any:
            if isinstance(x, Tensor) or not torch.is_tensor(x):
                return read(x) if isinstance(x, Tensor) else x
            admit(x.dtype)
            return from_torch(x)

        return jax.tree.map(array, tree, is_leaf=torch.is_tensor)

    def j2t_copy(self, tree: Any) -> Any:
        """Return arrays as tensors in PyTorch's own CPU memory."""
        return jax.tree.map(
            lambda x: j2t(widened(np.asarray(x))).clone() if isinstance(x, jax.Array) else x,
            tree,
        )


def words_of(key: Any) -> Any:
    """Return the words of a key: JAX's old or new kind, or a tensor of words."""
    key = read(key) if isinstance(key, Tensor) else key
    if isinstance(key, jax.Array) and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(key)
    return key


@functools.cache
def default_env() -> Environment:
    """Return the environment of the process."""
    return Environment()
