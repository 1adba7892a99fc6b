"""``python -m torch2jax`` is the doctor's command line.

It prints what it finds on this machine and proves that the bridge works on it. When all is well, it
also measures what a call costs.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import sys

from .._bridge.handler.extension import TARGET
from .costs import costs
from .diagnosis import Check, Diagnosis
from .findings import bridge, devices, memory, versions
from .printing import as_text, print_rich
from .proofs import proofs

TIMEOUT = 300
"""After this many seconds the doctor prints where every thread hangs, and gives up."""


def examine() -> Diagnosis:
    """Look at everything, and run the proofs."""
    diagnosis = Diagnosis()
    for section in (versions, devices, bridge, memory, proofs):
        try:
            diagnosis.checks += section()
        except Exception as error:  # the doctor reports it and goes on
            diagnosis.checks.append(Check.of_error(section.__name__.capitalize(), "look", error))
    if diagnosis.ok:
        found, diagnosis.microseconds = costs()
        diagnosis.checks += found
    return diagnosis


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 where the bridge works, otherwise 1."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {TARGET}",
        description=f"Show what {TARGET} finds on this machine, and prove that it works.",
        epilog="The exit status is 0 where it works, 1 where a proof or a check failed.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    with contextlib.suppress(AttributeError, OSError, ValueError):  # stderr may be no real file
        faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    try:
        diagnosis = examine()
    finally:
        faulthandler.cancel_dump_traceback_later()
    if arguments.json:
        print(diagnosis.as_json())
        return int(not diagnosis.ok)
    try:
        print_rich(diagnosis)
    except ImportError:
        encoding = sys.stdout.encoding or "ascii"
        print(as_text(diagnosis).encode(encoding, "replace").decode(encoding))
    return int(not diagnosis.ok)
