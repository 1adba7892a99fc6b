"""The doctor's findings as data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from .._bridge.handler.extension import TARGET


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    section: str
    name: str
    status: str
    """ "ok", "info", "warning" or "failed"."""
    detail: str
    remedy: str = ""


@dataclass
class Diagnosis:
    """All that was found."""

    checks: list[Check] = field(default_factory=list)
    microseconds: dict[str, float] = field(default_factory=dict)
    """Median cost of a call, by the way it is called."""

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.status == "failed"]

    @property
    def ok(self) -> bool:
        return not self.failed

    @property
    def verdict(self) -> str:
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
        return json.dumps(
            {
                "ok": self.ok,
                "verdict": self.verdict,
                "checks": [asdict(check) for check in self.checks],
                "microseconds": self.microseconds,
            },
            indent=2,
        )
