"""Scripts run in processes of their own, which begin with the imports that take long.

The server behind them has imported and computed nothing else: what JAX and PyTorch start when they
first compute, such as threads, starts in each process anew.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["Ended", "run_script"]

IMPORTED = (
    *("jax", "jax.numpy", "torch", "flax.nnx", "matplotlib.pyplot", "optax"),
    *("rich.console", "rich.progress", "sklearn.datasets", "torch.utils.data", "transformers"),
)
"""What the server imports, as far as it is installed; torch2jax refuses to be forked."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(IMPORTED))


class Ended(NamedTuple):
    """How a script has ended."""

    status: int | None
    printed: str


def run_script(
    script: Path, *arguments: str, cwd: Path, environment: Mapping[str, str], output: Path
) -> Ended:
    """Run a script, for which a ``UserWarning`` is an error; what it prints goes to ``output``."""
    process = _context.Process(
        target=_run, args=(str(script), arguments, str(cwd), dict(environment), str(output))
    )
    process.start()
    process.join()
    printed = output.read_text("utf-8")
    status = process.exitcode
    process.close()
    return Ended(status, printed)


def _run(
    script: str, arguments: tuple[str, ...], cwd: str, environment: dict[str, str], output: str
) -> None:
    import jax

    os.environ |= environment
    os.chdir(cwd)
    if platforms := os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", platforms)  # it was read when jax was imported
    with open(os.devnull) as nothing, open(output, "w") as printed:
        os.dup2(nothing.fileno(), 0)
        for stream in (1, 2):
            os.dup2(printed.fileno(), stream)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", line_buffering=True)  # type: ignore[union-attr]
    warnings.filterwarnings("error", category=UserWarning)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
