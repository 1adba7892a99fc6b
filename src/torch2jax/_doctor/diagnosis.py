"""The doctor keeps what it finds as data: one check for each thing that it looked at."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from .._bridge.handler.extension import TARGET


@dataclass(frozen=True)
class Check:
    """A check says what one look found, and what to do about it."""

    section: str
    name: str
    status: str
    """ "ok", "info", "warning" or "failed"."""
    detail: str
    remedy: str = ""

    @classmethod
    def of_error(cls, section: str, name: str, error: Exception) -> Check:
        """Return a failed check, with the first line of the exception that it ended with."""
        lines = str(error).strip().splitlines() or [""]
        return cls(section, name, "failed", f"{type(error).__name__}: {lines[0]}")


@dataclass
class Diagnosis:
    """A diagnosis holds all checks of one run, and what a call costs."""

    checks: list[Check] = field(default_factory=list)
    microseconds: dict[str, float] = field(default_factory=dict)
    """The median cost of a call, for each way of calling."""

    @property
    def failed(self) -> list[Check]:
        """Return the checks that show that the package does not work here."""
        return [check for check in self.checks if check.status == "failed"]

    @property
    def ok(self) -> bool:
        """Say whether nothing failed."""
        return not self.failed

    @property
    def verdict(self) -> str:
        """Sum everything up in one sentence."""
        proofs = [check for check in self.checks if check.section == "Proofs"]
        passed = sum(check.status == "ok" for check in proofs)
        warnings = sum(check.status == "warning" for check in self.checks)
        if self.ok:
            text = f"{TARGET} works here: {passed} of {len(proofs)} proofs passed"
        else:
            names = ", ".join(check.name for check in self.failed)
            text = f"{TARGET} does not work here: {names} failed"
        return text + (f", {warnings} warning{'s' * (warnings > 1)}." if warnings else ".")

    def as_json(self) -> str:
        """Return everything as JSON, for programs that read it."""
        return json.dumps(
            {
                "ok": self.ok,
                "verdict": self.verdict,
                "checks": [asdict(check) for check in self.checks],
                "microseconds": self.microseconds,
            },
            indent=2,
        )
