"""The tables of a run: for a terminal, and as a section of a Markdown page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pages.page import number, table
from rich.console import Console
from rich.table import Table
from subjects.peers import SUBJECTS


@dataclass(frozen=True)
class Figure:
    median: float
    least: float


@dataclass(frozen=True)
class Budget:
    title: str
    figure: Figure
    limit: float
    unit: str

    @property
    def verdict(self) -> str:
        """ "borderline": the median and the least of the rounds disagree."""
        met = self.figure.median <= self.limit, self.figure.least <= self.limit
        return "met" if all(met) else "borderline" if any(met) else "missed"


@dataclass(frozen=True)
class Report:
    date: str
    machine: str
    load: float
    versions: dict[str, dict[str, str]]
    command: str
    rounds: int
    startup_rounds: int
    titles: dict[str, str]
    calls: dict[str, dict[str, Figure]]
    skipped: dict[str, dict[str, str]]
    slopes: dict[str, Figure]
    startup: dict[str, dict[str, Figure]]
    budgets: list[Budget]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdicts": {b.title: b.verdict for b in self.budgets}}


def figure(f: Figure) -> str:
    return f"{number(f.median)} ({number(f.least)})"


def median(f: Figure | None) -> str:
    return number(f.median) if f else "-"


Rows = Iterator[list[str]]


def call_rows(report: Report, cases: list[str]) -> Rows:
    """The medians of some cases; those of one table have their subjects in common."""
    loops = cases[0].startswith("loop")
    subjects = [s for s in SUBJECTS if any(s in report.calls[case] for case in cases)]
    yield ["µs a call", *subjects]
    for case in cases:
        yield [report.titles[case], *(median(report.calls[case].get(s)) for s in subjects)]
    if loops and report.slopes:
        yield ["each further argument", *(median(report.slopes.get(s)) for s in subjects)]


def startup_rows(report: Report) -> Rows:
    bridges = list(report.startup["import"])
    yield ["seconds", *bridges]
    titles = {"import": "import, above torch and jax", "first": "first wrap and call"}
    titles["next"] = "wrap and call of the next function"
    for stage, title in titles.items():
        yield [title, *(median(report.startup[stage].get(b)) for b in bridges)]


def budget_rows(report: Report) -> Rows:
    yield ["budget", "at most", "measured", "verdict"]
    for b in report.budgets:
        yield [
            b.title,
            f"{number(b.limit)} {b.unit}".rstrip(),
            f"{figure(b.figure)} {b.unit}".rstrip(),
            b.verdict,
        ]


def tables(report: Report) -> list[tuple[str, list[list[str]]]]:
    named: list[tuple[str, list[list[str]]]] = []
    loops = [c for c in report.titles if c.startswith("loop")]
    calls = [c for c in report.titles if c not in loops]
    rounds = f"medians of {report.rounds} rounds"
    if loops:
        title = f"In a compiled loop: an identity function of float32[16], {rounds}"
        named.append((title, list(call_rows(report, loops))))
    if calls:
        named.append((f"From Python, {rounds}", list(call_rows(report, calls))))
    if report.startup["import"]:
        title = f"Start, medians of {report.startup_rounds} processes"
        named.append((title, list(startup_rows(report))))
    named.append(("Budgets, medians (and the least of the rounds)", list(budget_rows(report))))
    return named


def notes(report: Report) -> list[str]:
    """Where there is no figure, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for case, of_case in report.skipped.items():
        for subject, reason in of_case.items():
            reasons.setdefault((subject, reason), []).append(case)
    return [
        f"{subject} ({', '.join(cases)}): {reason}." for (subject, reason), cases in reasons.items()
    ]


def print_tables(report: Report) -> None:
    console = Console()
    console.width = max(console.width, 120)
    for title, (head, *rows) in tables(report):
        shown = Table(title=title)
        for i, column in enumerate(head):
            shown.add_column(column, justify="right" if i else "left", overflow="fold")
        for row in rows:
            colour = {"met": "green", "missed": "red", "borderline": "yellow"}.get(row[-1], "")
            shown.add_row(*row[:-1], f"[{colour}]{row[-1]}[/]" if colour else row[-1])
        console.print(shown)
    for note in notes(report):
        console.print(f"no figure: {note}", markup=False, highlight=False)


def markdown(report: Report) -> str:
    parts = [
        f"Measured {report.date} on {report.machine} (load {report.load:.1f} at the start), by",
        f"`{report.command}`.",
        "",
    ]
    for name, versions in report.versions.items():
        parts.append(f"- {name}: " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    for title, (head, *rows) in tables(report):
        parts += ["", f"### {title}", "", table(head, rows)]
    if notes(report):
        parts += ["", "No figure:", "", *(f"- {note}" for note in notes(report))]
    return "\n".join(parts)
