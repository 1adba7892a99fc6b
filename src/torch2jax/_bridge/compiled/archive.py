"""A program with compiled calls and its libraries are one file."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.export

from ..._errors import Torch2JaxError
from ..handler import extension
from . import building, cache
from .libraries import load, loaded

_FORMAT = 1
_NAME = re.compile(r"[0-9a-f]{40}")
_MUST_AGREE = ("torch", "machine", "processor", "layout")


class LoadedProgram:
    """A ``LoadedProgram`` is a program of ``save_compiled``; ``load_compiled`` gives it."""

    def __init__(self, exported: jax.export.Exported) -> None:
        self.exported = exported
        """What ``jax.export`` made: its arguments' and results' types, and its platforms."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the program, which jits and, if it was saved so, differentiates."""
        return self.exported.call(*args, **kwargs)

    def __repr__(self) -> str:
        return f"LoadedProgram({self.exported.fun_name})"


def save_compiled(
    path: str | os.PathLike[str], exported: jax.export.Exported, vjp_order: int = 0
) -> None:
    """Save an exported program, and the libraries that it calls, as one file.

    The file needs neither the functions nor the classes of PyTorch from which they were compiled.
    It holds machine code for this processor and this version of PyTorch.

    Args:
      path: the file, which is replaced if it is there.
      exported: what ``jax.export.export(jax.jit(f), disabled_checks=export_checks)(...)`` returned.
      vjp_order: how often the program can be differentiated where it is loaded.

    Raises:
      Torch2JaxError: where the program calls a library that this process has not compiled or
        loaded, or a function of PyTorch that is not compiled.

    Examples:
      >>> import os, tempfile, jax, jax.numpy as jnp, torch
      >>> from torch2jax import export_checks, torch2jax
      >>> f = torch2jax(lambda x: 2 * x, compiled=True)
      >>> export = jax.export.export(jax.jit(f), disabled_checks=export_checks)
      >>> path = os.path.join(tempfile.mkdtemp(), "double.zip")
      >>> save_compiled(path, export(jnp.ones(3)))
      >>> load_compiled(path)(jnp.ones(3))
      Array([2., 2., 2.], dtype=float32)
    """
    names: set[str] = set()
    program: Any = exported
    for order in range(vjp_order + 1):
        text = program.mlir_module()
        if re.search(rf"custom_call @{extension.TARGET}\(", text):
            raise Torch2JaxError(
                "the program calls PyTorch through Python, too: wrap all of its functions with "
                "compiled=True, or use jax.export and torch2jax.register."
            )
        names.update(_names(text))
        if order < vjp_order:
            program = program.vjp()
    record: dict[str, Any] = {}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(names):
            library = loaded(name)
            if library is None:
                raise Torch2JaxError(f"the program calls the library {name}, which is not loaded.")
            if not cache.is_whole(library):
                raise Torch2JaxError(
                    f"the library {name} is no longer in {library.parent}: compile it anew."
                )
            record[name] = cache.record_of(library)
            archive.write(library, f"{name}.so")
        made = {"format": _FORMAT, "surroundings": building.surroundings(), "libraries": record}
        archive.writestr("program.bin", bytes(exported.serialize(vjp_order=vjp_order)))
        archive.writestr("manifest.json", json.dumps(made))
    target = Path(path)
    fresh = target.with_name(f"{target.name}.{os.getpid()}.new")
    fresh.write_bytes(buffer.getvalue())
    os.replace(fresh, target)


def _names(text: str) -> list[str]:
    """Return the names of the libraries that a program calls."""
    calls = [line for line in text.splitlines() if f"@{extension.COMPILED}(" in line]
    return [m[1] for line in calls if (m := re.search(r'name = "([0-9a-f]{40})"', line))]


def load_compiled(path: str | os.PathLike[str]) -> LoadedProgram:
    """Load what ``save_compiled`` saved.

    The file holds machine code, which this process will run: load only what comes from a source
    that you trust. Its libraries go into the cache of compiled libraries.

    Args:
      path: the file.

    Returns:
      The program, a function of arrays. Its ``exported`` is what ``jax.export`` made: the types of
      arguments and results, and the platforms.

    Raises:
      Torch2JaxError: for another file, a damaged one, or one that was made for another processor or
        version of PyTorch.

    Examples:
      >>> from torch2jax import Torch2JaxError
      >>> try:
      ...     load_compiled(__file__)
      ... except Torch2JaxError as error:
      ...     print(str(error).partition(" is ")[2])
      no file of save_compiled: File is not a zip file
    """
    try:
        with zipfile.ZipFile(path) as archive:
            made = json.loads(archive.read("manifest.json"))
            if made["format"] != _FORMAT:
                raise Torch2JaxError(f"{path} has a format that this version does not know.")
            _check(made["surroundings"], path)
            for name, record in made["libraries"].items():
                _unpack(archive, name, record, path)
            program = archive.read("program.bin")
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise Torch2JaxError(f"{path} is no file of save_compiled: {error}") from None
    return LoadedProgram(jax.export.deserialize(bytearray(program)))


def _check(made: dict[str, Any], path: Any) -> None:
    here = building.surroundings()
    for fact in _MUST_AGREE:
        if made.get(fact) != here[fact]:
            raise Torch2JaxError(
                f"{path} was made with {fact} {made.get(fact)!r}, and here it is {here[fact]!r}: "
                "compile the program anew on a machine like this one."
            )


def _unpack(archive: zipfile.ZipFile, name: str, record: dict[str, Any], path: Any) -> None:
    if not _NAME.fullmatch(name):
        raise Torch2JaxError(f"{path} is no file of save_compiled: it names a library {name!r}.")

    def unpack(fresh: Path) -> None:
        with archive.open(f"{name}.so") as packed, open(fresh, "wb") as file:
            shutil.copyfileobj(packed, file)
        if cache.file_digest(fresh) != record["sha256"]:
            raise Torch2JaxError(f"{path} is damaged: {name}.so is not what was saved.")

    kept = {k: v for k, v in record.items() if k not in ("sha256", "made")}
    load(name, cache.library(name, unpack, kept))
