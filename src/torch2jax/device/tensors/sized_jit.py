"""Programs of small arrays are compiled in a third of the time: XLA leaves its optimisations out.

With jax 0.12 it is two thirds, because its XLA has fewer that can be left out.

A first eager call of an operator compiles, and for arrays of a few thousand numbers that takes far
longer than most programs will ever run. On a CPU a program without the optimisations costs up to
some ten microseconds more for such arrays. Larger arrays get XLA's usual program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

__all__ = ["Large", "SizedJit"]

_MOST = 1024
"""The elements of a small array. Of 65,536 elements the quick programs took up to nine times as
long."""

_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_use_fusion_emitters": False,
}


class Large(Exception):
    """A trace has met an array that is not small."""


class SizedJit:
    """``SizedJit(fn).call`` is ``jax.jit(fn)``, compiled in one of two ways by the sizes of arrays.

    ``seen`` takes what ``fn`` takes, and returns further arrays that have to be small: those of
    views, which may be expanded. Without optimisations XLA would store them.

    ``call`` is a jitted function itself as long as all calls have gone one way, because another
    function of Python in between costs a microsecond. It may raise ``Large``, and then has changed:
    ``SizedJit(fn)(...)`` calls it again, and so does the extension.
    """

    __slots__ = ("_fn", "_full", "_quick", "_seen", "_shapes", "call")

    def __init__(self, fn: Callable[..., Any], seen: Callable[..., Any] | None = None) -> None:
        self._fn, self._seen = fn, seen
        self._full: Callable[..., Any] = jax.jit(fn)
        self._quick: Callable[..., Any] = self._full
        self._shapes: set[Any] = set()
        """Shapes of operands with which a trace has met a large array."""
        self.call: Callable[..., Any] = self._first

    def __call__(self, *arrays: Any) -> Any:
        try:
            return self.call(*arrays)
        except Large:
            return self.call(*arrays)

    def _first(self, *arrays: Any) -> Any:
        options = _options()
        if options is None or any(_count(x) > _MOST for x in jax.tree.leaves(arrays)):
            self.call = self._full
        else:
            self._quick = jax.jit(self._small, compiler_options=options)
            self.call = self._quick
        return self(*arrays)

    def _sized(self, *arrays: Any) -> Any:
        if _shapes(arrays) in self._shapes:
            return self._full(*arrays)
        return self._quick(*arrays)

    def _small(self, *arrays: Any) -> Any:
        """Call the function, which is being traced."""
        try:
            _refuse_large(arrays)
            if self._seen is not None:
                _refuse_large(self._seen(*arrays))
            out = self._fn(*arrays)
            _refuse_large(out)
        except Large:
            self._shapes.add(_shapes(arrays))
            self.call = self._sized
            raise
        return out


def _refuse_large(arrays: Any) -> None:
    if any(_count(x) > _MOST for x in jax.tree.leaves(arrays)):
        raise Large


def _count(x: Any) -> int:
    return getattr(x, "size", 1)


def _shapes(arrays: Sequence[Any]) -> tuple[Any, ...]:
    return tuple([getattr(x[0] if type(x) is tuple else x, "shape", ()) for x in arrays])


@functools.cache
def _options() -> dict[str, Any] | None:
    """Return the options of a quick compilation; None where programs are not for the CPU."""
    if jax.default_backend() != "cpu":
        return None
    return _known(_QUICK) or None


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that this version of XLA knows. That of jax 0.12 has no other fusions."""
    try:
        jax.jit(lambda x: x, compiler_options=options)(1)
    except jax.errors.JaxRuntimeError:
        if len(options) == 1:
            return {}
        each = [_known({name: value}) for name, value in options.items()]
        return {name: value for known in each for name, value in known.items()}
    return options
