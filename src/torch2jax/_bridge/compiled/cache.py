"""Compiled libraries are kept on disk. This file imports neither torch nor JAX.

Each library ``NAME.so`` has a record ``NAME.json`` beside it with the digest of its bytes, its
label and what it was made with. The folder is ``TORCH2JAX_CACHE_DIR``, or ``torch2jax`` in the
platform's folder for caches. Processes may share it: a library appears whole, under its lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._errors import Torch2JaxError

_NAME = "torch2jax"


def folder() -> Path:
    """Return the folder of the libraries; it is made when it is missing, for this user alone."""
    given = os.environ.get("TORCH2JAX_CACHE_DIR")
    path = Path(given) if given else _platform_folder() / _NAME
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        status = path.stat()
        if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o002:
            raise Torch2JaxError(
                f"{path} belongs to another user, or everyone may write into it: libraries from "
                "there are not loaded. Name another folder in TORCH2JAX_CACHE_DIR."
            )
    return path


def _platform_folder() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def limit() -> int:
    """Return how many bytes the libraries may take: ``TORCH2JAX_CACHE_BYTES``, or 2 GiB."""
    return int(os.environ.get("TORCH2JAX_CACHE_BYTES") or 2 * 2**30)


@dataclass(frozen=True)
class Entry:
    """An entry is a library on disk."""

    path: Path
    record: dict[str, Any]

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def used(self) -> float:
        """Return when the library was last looked for, in seconds since 1970."""
        return self.path.stat().st_mtime


def library(
    name: str, build: Callable[[Path], None], record: dict[str, Any], where: Path | None = None
) -> Path:
    """Return the path of the library ``name``, which ``build(path)`` makes where it is missing.

    A library whose bytes are not those of its record is made anew, and never loaded.
    """
    base = where or folder()
    path = base / f"{name}.so"
    if is_whole(path):
        _touch(path)
        return path
    from filelock import FileLock  # PyTorch needs it too

    with FileLock(base / f"{name}.lock"):
        if is_whole(path):  # another process has made it
            return path
        fresh = base / f"{name}.{os.getpid()}.new"
        try:
            build(fresh)
            put(path, fresh, record)
        finally:
            fresh.unlink(missing_ok=True)
    _evict(base, path)
    return path


def put(path: Path, fresh: Path, record: dict[str, Any]) -> None:
    """Move a library to its place, with its record."""
    whole = {**record, "sha256": file_digest(fresh), "made": time.time()}
    written = fresh.with_suffix(".json.new")
    written.write_text(json.dumps(whole))
    path.with_suffix(".json").unlink(missing_ok=True)  # no record tells of the library before
    os.replace(fresh, path)
    os.replace(written, path.with_suffix(".json"))


def is_whole(path: Path) -> bool:
    """Return whether a library is there, with the bytes of its record."""
    try:
        return record_of(path)["sha256"] == file_digest(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def record_of(path: Path) -> dict[str, Any]:
    """Return the record beside a library."""
    return json.loads(path.with_suffix(".json").read_text())


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entries() -> list[Entry]:
    """Return the libraries, the last used first."""
    found = []
    for path in folder().glob("*.so"):
        with contextlib.suppress(OSError, ValueError):
            found.append(Entry(path, record_of(path)))
    return sorted(found, key=lambda e: e.used, reverse=True)


def clear() -> int:
    """Remove all libraries; return how many bytes they took."""
    return sum(_removed(folder().glob("*.so")))


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):  # the folder may be read-only
        os.utime(path)


def _evict(base: Path, keep: Path) -> None:
    """Remove the libraries that were not used for longest, until the others fit the limit."""
    left = limit()
    old: list[Path] = []
    with contextlib.suppress(OSError):
        for path in sorted(base.glob("*.so"), key=lambda p: p.stat().st_mtime, reverse=True):
            left -= path.stat().st_size
            if left < 0 and path != keep:
                old.append(path)
    list(_removed(old))


def _removed(paths: Any) -> Iterator[int]:
    for path in paths:
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            # A process that has loaded it keeps it until it ends.
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)
            yield size
