"""What takes longer than two seconds says what it is, on stderr: first traces and compilations."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

__all__ = ["telling"]

_SILENT_FOR = 2.0


class _Here(threading.local):
    inside = False


_here = _Here()


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """Print ``what`` when the block has taken two seconds, and then how long it took.

    A block inside of another one on the same thread says nothing of its own, because the outer one
    has a name that the user knows. The environment's TORCH2JAX_PROGRESS=0 keeps all of them silent.
    """
    if _here.inside or os.environ.get("TORCH2JAX_PROGRESS", "1") == "0":
        yield
        return
    started, done, said = time.monotonic(), threading.Event(), threading.Event()

    def tell() -> None:
        if not done.wait(_SILENT_FOR):
            said.set()
            print(f"torch2jax: {what} ...", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    _here.inside = True
    try:
        yield
    finally:
        _here.inside = False
        done.set()
        thread.join()
        if said.is_set():
            took = time.monotonic() - started
            print(f"torch2jax: {what} took {took:.0f} s", file=sys.stderr, flush=True)
