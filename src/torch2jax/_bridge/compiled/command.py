"""``python -m torch2jax cache`` shows the compiled libraries on disk, and removes them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from ..handler.extension import TARGET
from . import cache


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {TARGET} cache",
        description="Show the libraries that compiled=True keeps on disk, the last used first.",
        epilog="TORCH2JAX_CACHE_DIR names the folder, TORCH2JAX_CACHE_BYTES how much it may hold.",
    )
    parser.add_argument("--clear", action="store_true", help="remove all of them")
    arguments = parser.parse_args(argv)
    if arguments.clear:
        print(f"removed {cache.clear() / 1e6:.1f} MB from {cache.folder()}")
        return 0
    found = cache.entries()
    for entry in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        torch = entry.record.get("torch", "?")
        label = entry.record.get("label", "?")
        print(f"{entry.path.stem[:12]}  {entry.size / 1e6:6.1f} MB  {used}  torch {torch}  {label}")
    total = sum(entry.size for entry in found)
    print(
        f"{len(found)} libraries, {total / 1e6:.1f} of at most {cache.limit() / 1e6:.0f} MB, "
        f"in {cache.folder()}"
    )
    return 0
