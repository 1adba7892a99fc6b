"""The doctor: what was found on this machine, and a proof that the bridge works on it.

``python -m torch2jax`` prints it. Every proof runs a PyTorch function through a transform of JAX
and compares with the same function in ``jax.numpy`` under the same transform.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import sys

from .._bridge.handler.extension import TARGET
from .costs import costs
from .findings import bridge, devices, memory, versions
from .printing import as_text, print_rich
from .proofs import proofs, told
from .report import Check, Diagnosis

TIMEOUT = 300
"""Seconds after which the doctor prints where every thread hangs, and gives up."""


def examine() -> Diagnosis:
    """Look at everything, and run the proofs."""
    report = Diagnosis()
    for section in (versions, devices, bridge, memory, proofs):
        try:
            report.checks += section()
        except Exception as error:  # the doctor tells of it, and goes on
            name = section.__name__.lstrip("_").capitalize()
            report.checks.append(Check(name, "look", "failed", told(error)))
    if report.ok:
        found, report.microseconds = costs()
        report.checks += found
    return report


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 where the bridge works, 1 where it does not."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {TARGET}",
        description=f"Show what {TARGET} finds on this machine, and prove that it works.",
        epilog="The exit status is 0 where it works, 1 where a proof or a check failed.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no stderr of its own
        faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    try:
        report = examine()
    finally:
        faulthandler.cancel_dump_traceback_later()
    if arguments.json:
        print(report.as_json())
        return int(not report.ok)
    try:
        print_rich(report)
    except ImportError:
        encoding = sys.stdout.encoding or "ascii"
        print(as_text(report).encode(encoding, "replace").decode(encoding))
    return int(not report.ok)
