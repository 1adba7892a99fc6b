"""Callees get names, and entries in the handler's table."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections import Counter
from typing import Any

import jax

from ... import _refusals
from ..torch_side.callee import Callee
from ..torch_side.modules import loans
from ..torch_side.normalizations import in_parts
from ..torch_side.placing.placement import Placement
from . import extension

_names: Counter[str] = Counter()
_lock = threading.RLock()


def register(callee: Callee, several_devices: bool = False) -> Any:
    """Return the callee's entry in the handler's table.

    The entry is made, and the callee gets its name, when the callee is first lowered. The callee
    has another entry for programs on several devices.
    """
    with _lock:
        if callee.registrations[several_devices] is None:
            name = name_of(callee) + SEVERAL * several_devices
            callee.registrations[several_devices] = entry_of(callee, name, several_devices)
        return callee.registrations[several_devices]


SEVERAL = "/several"
"""The name of a call in a program on several devices ends with this."""


def entry_of(callee: Callee, name: str, several_devices: bool) -> Any:
    """Make an entry of the handler's table; it is withdrawn when nothing refers to it."""
    options, is_root = callee.options, callee.parent is None
    run, collect = runnable(callee)
    if several_devices:
        run = _refusals.on_one_of_several(run)
    in_place = is_root and (options.pass_outputs or options.aliases)
    return extension.Entry(
        name=name,
        run=run,
        collect=collect,
        place=None if in_place else Placement(run, collect, len(callee.inputs)),
        label=options.label + callee.path,
        inputs=list(callee.inputs),
        outputs=list(callee.outputs),
        default_dtype=options.default_dtype,
        pass_outputs=is_root and options.pass_outputs,
        inplace=[i for i, _ in options.aliases] if is_root else [],
        # Such a call may be made again where a GPU's memory ran out.
        pure=not (options.side_effects or options.draws or options.aliases or options.mutated),
    )


def runnable(callee: Callee) -> tuple[Any, Any]:
    """Return ``run``, and what makes a tuple of its result, or None where that is one already."""
    program = callee.program
    run, collect = getattr(program, "bare", None) or (in_parts(program, program.run), None)
    return loans.scoped(run) if callee.options.borrows else run, collect


def name_of(callee: Callee) -> str:
    """Return the callee's name: ``module.qualname``, a counter, and how it is derived.

    A root gets its counter when it or anything derived from it is first lowered, so equal programs
    have equal names in every process.
    """
    if callee.parent is not None:
        return name_of(callee.parent) + callee.suffix
    if callee.name is None:
        root = callee.options.name
        count = _names[root]
        _names[root] += 1
        callee.name = root if callee.options.named and count == 0 else f"{root}#{count}"
    return callee.name


def _shut_down() -> None:
    """Wait for what was dispatched, 5 s at most, then refuse calls.

    Programs that still ran while the interpreter shut down have aborted some processes.
    """
    deadline = time.monotonic() + 5
    if _names:  # something was lowered, so JAX has a backend
        with contextlib.suppress(Exception):
            for array in jax.live_arrays():
                while not (array.is_deleted() or array.is_ready()):
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.001)
    extension.begin_shutdown()


atexit.register(_shut_down)
