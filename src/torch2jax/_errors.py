"""torch2jax raises these errors, and warns with one category."""

from __future__ import annotations

__all__ = [
    "DifferentiationError",
    "SignatureError",
    "Torch2JaxError",
    "Torch2JaxWarning",
    "TorchCallError",
    "UnsupportedDtypeError",
]


class Torch2JaxError(Exception):
    """Every error here has this base; it is raised itself for values gone or out of reach."""


class SignatureError(Torch2JaxError, TypeError):
    """Arguments, results or their structure are not what a call, option or conversion takes."""


class UnsupportedDtypeError(Torch2JaxError, TypeError):
    """The other side has no such dtype, or its values need `jax_enable_x64`."""


class DifferentiationError(Torch2JaxError, TypeError):
    """A function is differentiated more often than its ``depth=`` allows."""


class TorchCallError(Torch2JaxError, RuntimeError):
    """The PyTorch function raised during an eager call; `__cause__` is its exception.

    It does not wrap `KeyboardInterrupt` and `SystemExit`, which an eager call lets through.
    """


class Torch2JaxWarning(UserWarning):
    """Every warning of torch2jax has this category, so that one filter governs them all."""
