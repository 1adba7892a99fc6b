"""Makes "jax" a PyTorch device: once, for the process, with no change for other tensors."""

from __future__ import annotations

import threading
from typing import Any

import torch

from .._errors import Torch2JaxError
from .._torch_compat import allow_foreach, foreach_types, set_up_device
from . import dispatch, generator, methods, modules, random
from .autocast import register_autocast, scale_gradients
from .composites import register_composites
from .loading import register_loading
from .tensor import Tensor, only_one

__all__ = ["enable", "is_enabled"]

_lock = threading.Lock()
_libraries: list[Any] = []


class _Module:
    """What PyTorch asks a device for: ``torch.jax``."""

    def is_available(self) -> bool:
        # What asks whether an accelerator is there wants to pin memory for it (DataLoader).
        return False

    def is_initialized(self) -> bool:
        return True

    def is_built(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def _lazy_init(self) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        """Programs are dispatched asynchronously, and values wait for themselves."""

    def empty_cache(self) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed(self, seed: int) -> None:
        random.seed(seed)

    manual_seed_all = manual_seed

    def seed(self) -> None:
        random.seed(torch.seed())

    def initial_seed(self) -> int:
        return random.initial_seed()

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return random.get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        random.set_state(state)

    class device:  # the name that torch looks up: torch.jax.device(index)
        def __init__(self, index: Any) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: Any) -> None:
            pass


def is_enabled() -> bool:
    """Whether "jax" is a PyTorch device in this process.

    >>> import torch2jax
    >>> torch2jax.device.enable()
    >>> torch2jax.device.is_enabled()
    True
    """
    return bool(_libraries)


def enable() -> None:
    """Make "jax" a PyTorch device, for this process. Calling it again does nothing.

    Afterwards ``torch.randn(3, device="jax")``, ``.to("jax")``, ``with torch.device("jax"):`` and
    whatever else takes a device work, on the device that JAX computes on. Other tensors are as
    before: there is no mode.

    Raises:
        Torch2JaxError: another library has taken PyTorch's one place for a device of a library;
            or PyTorch is older than 2.10.

    >>> import torch, torch2jax
    >>> torch2jax.device.enable()
    >>> x = torch.ones(2, device="jax")
    >>> x + 1
    tensor([2., 2.], device='jax:0')
    """
    with _lock:
        if _libraries:
            return
        taken = torch._C._get_privateuse1_backend_name()
        if taken not in ("privateuseone", "jax"):
            raise Torch2JaxError(
                f"PyTorch has place for one device from outside, and {taken!r} has taken it."
            )
        set_up_device("jax", _Module())
        _libraries.append(_register_factories())
        _libraries.append(register_autocast())
        _libraries.append(register_composites())
        methods.install()
        modules.keep_ties()
        generator.install()
        scale_gradients()
        register_loading()
        allow_foreach("lazy")  # as which C++ knows the device
        # Optimizers take their multi-tensor form for these types of parameters only.
        for types in foreach_types():
            if Tensor not in types:
                types.append(Tensor)


def _register_factories() -> Any:
    """Kernels for operators without a tensor among their arguments."""
    library = torch.library.Library("aten", "IMPL")
    for name in _FACTORIES:
        packet, _, which = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet, None), which or "default", None)
        if op is None:
            continue
        for key in ("PrivateUse1", "Lazy"):
            library.impl(name, _factory(op), key)
    for key in ("PrivateUse1", "Lazy"):
        library.impl("_copy_from", _copy_from, key)
    return library


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    """As which ``torch.tensor(data, device="jax")`` moves its data, past ``__torch_dispatch__``."""
    return dispatch.dispatch(torch.ops.aten.copy_.default, (), (target, source))


_FACTORIES = (
    "empty.memory_format",
    "empty_strided",
    "empty_permuted",
    "zeros",
    "ones",
    "full",
    "scalar_tensor",
    "arange",
    "arange.start",
    "arange.start_step",
    "linspace",
    "logspace",
    "eye",
    "eye.m",
    "tril_indices",
    "triu_indices",
    "rand",
    "rand.generator",
    "randn",
    "randn.generator",
    "randint",
    "randint.generator",
    "randint.low",
    "randint.low_generator",
    "randperm",
    "randperm.generator",
    "_efficientzerotensor",
    "kaiser_window",
    "kaiser_window.periodic",
    "kaiser_window.beta",
)


def _factory(op: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> Any:
        only_one(kwargs.pop("device", None))
        kwargs.pop("pin_memory", None)
        kwargs.pop("layout", None)
        if kwargs.get("dtype", 0) is None:
            kwargs.pop("dtype")
        return dispatch.dispatch(op, (), args, kwargs)

    return make
