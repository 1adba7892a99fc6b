"""``jax.export`` exports programs with calls, and ``register`` serves them where they are loaded.

The name of a call in an exported program is that of its callee, ``|``, and the types of the
operands of the user's function:

    name/vjp(0;0)/tape(0)|float32[3,4],float32[4]

The process that loads it looks the name up among the functions that it registered, and follows the
path from there. Nothing is imported, and nothing else is read from the name.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import jax.export

from ..._errors import SignatureError
from ..handler import entries, extension
from ..torch_side.callee import Callee
from ..torch_side.derivatives import Jvp, Vjp, Vmap
from ..torch_side.tape.calls import keeping, with_token

Avals = Sequence[tuple[tuple[int, ...], Any]]

export_checks = [
    jax.export.DisabledSafetyCheck.custom_call(target)
    for target in (extension.TARGET, extension.COMPILED)
]
"""``jax.export.export(..., disabled_checks=)`` needs these for programs that contain a call."""

_lock = threading.RLock()
_registered: dict[str, dict[str, Callee]] = {}
"""Callees of users' functions, by name and signature."""
_wrapped: dict[str, Any] = {}
"""Registered functions by name. They live on, so that registering one again finds it."""
_entries: dict[str, tuple[Callee, Any]] = {}
"""Callees and their entries by exported name. They live as long as the process."""
_exported: weakref.WeakValueDictionary[str, Callee] = weakref.WeakValueDictionary()
"""Callees that this process exported itself, by exported name."""


def provide(name: str, wrapped: Any, callee: Callee, avals: Avals) -> None:
    """Let exported programs call ``callee``, of the function ``wrapped``, as ``name``."""
    if entries.name_of(callee) != name:
        raise SignatureError(
            f"another function, or another structure of arguments, has the name {name!r} in this "
            "process: register before wrapping under that name, and give each its own."
        )
    with _lock:
        _registered.setdefault(name, {})[_signature(avals)] = callee
        _wrapped[name] = wrapped


def exported_name(callee: Callee, avals: Sequence[Any], several_devices: bool) -> str:
    """Name ``callee`` as an exported program calls it with operands of these avals."""
    if not callee.options.named:
        raise SignatureError(
            f"{callee.options.label} is exported without a name: wrap it with torch2jax(..., "
            'name="...") and provide it under that name, by torch2jax.register, where the program '
            "is loaded."
        )
    operands = _user_operands(callee, [(tuple(x.shape), x.dtype) for x in avals])
    name = entries.name_of(callee) + entries.SEVERAL * several_devices
    name = f"{name}|{_signature(operands)}"
    _exported[name] = callee
    return name


def _user_operands(callee: Callee, avals: Avals) -> Avals:
    """Return shapes and dtypes of the user's operands in a call derived from the function."""
    while (parent := callee.parent) is not None:
        avals = callee.without_token(avals)
        if isinstance(callee.program, Vmap):
            avals = [
                (shape if d is None else (*shape[:d], *shape[d + 1 :]), dtype)
                for (shape, dtype), d in zip(avals, callee.program.dims, strict=True)
            ]
        avals = avals[: len(parent.inputs)]
        callee = parent
    return [x for i, x in enumerate(avals) if i != callee.options.rng]


def _signature(avals: Avals) -> str:
    return ",".join(f"{dtype}[{','.join(map(str, shape))}]" for shape, dtype in avals)


def resolve(exported: str) -> str:
    """Enter what an exported program calls into the handler's table; return "", or why not."""
    with _lock:
        path, bar, signature = exported.rpartition("|")
        name = next((n for n in _registered if path == n or path.startswith(n + "/")), None)
        callee = _exported.get(exported)
        if callee is None and (not bar or name is None):
            return (
                f'no PyTorch function is registered as "{path or exported}" in this process: wrap '
                "it with torch2jax (or provide it with torch2jax.register) before running a cached "
                "or exported program"
            )
        if callee is None:
            assert name is not None
            root = _registered[name].get(signature)
            if root is None:
                return (
                    f'"{name}" was exported for ({signature}) and is registered for '
                    f"({'), ('.join(_registered[name])}): register it for these arguments too"
                )
            callee = _follow(root, path.removeprefix(name))
            if callee is None:
                return f'"{exported}" is no name that torch2jax gives'
        several = path.endswith(entries.SEVERAL)
        _entries[exported] = callee, entries.entry_of(callee, exported, several)
        return ""


_STEP = re.compile(
    r"/(?:(?P<derivative>jvp|vjp)\((?P<wrt>[\d,]*);(?P<of>[\d,]*)\)"
    r"|(?P<batch>vmap|rows)\((?P<dims>(?:\d+|None)(?:,(?:\d+|None))*)\)"
    r"|(?P<graph>keep|tape)\((?P<leaves>[\d,]*)\)"
    r"|several$)"
)


def _follow(callee: Callee, path: str) -> Callee | None:
    """Return what ``path`` derives from ``callee``; None where it does not lead on."""
    while path:
        step = _STEP.match(path)
        if step is None:
            return None
        path = path[step.end() :]
        try:
            if step["derivative"]:
                derive = callee.jvp if step["derivative"] == "jvp" else callee.vjp
                callee = derive(_numbers(step["wrt"]), _numbers(step["of"]))
            elif step["batch"]:
                dims = tuple(None if d == "None" else int(d) for d in step["dims"].split(","))
                callee = callee.vmap(dims) if step["batch"] == "vmap" else callee.rows(dims)
            elif step["graph"] == "keep":
                callee = keeping(callee, _numbers(step["leaves"]))
            elif step["graph"] == "tape":
                callee = _taped(callee, _numbers(step["leaves"]))
        except (IndexError, AttributeError):
            return None
    return callee


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _taped(callee: Callee, wrt: tuple[int, ...]) -> Callee:
    """Give a derivative, or its batched form, a token of the call whose derivative it is."""
    derivative: Any = callee
    while isinstance(derivative.program, Vmap):
        derivative = derivative.parent
    program: Any = derivative.program
    seeds = program.wrt if isinstance(program, Jvp) else program.of
    assert isinstance(program, Jvp | Vjp)
    return with_token(callee, len(seeds), keeping(derivative.parent, wrt))


extension.resolve_by(resolve)
