"""The limits of device "jax" that PyTorch's tests for devices show, by name."""

from __future__ import annotations

from typing import NamedTuple


class Limit(NamedTuple):
    """A test whose name matches ``test``, and whose error matches ``text``, shows the limit."""

    name: str
    why: str
    test: str
    text: str


LIMITS: tuple[Limit, ...] = ()
