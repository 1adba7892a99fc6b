"""The doctor prints its report: in colours where rich is installed, else as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .diagnosis import Check, Diagnosis

MARKS = {"ok": "ok", "info": "-", "warning": "!", "failed": "FAILED"}
COLOURS = {"ok": "green", "info": "dim", "warning": "yellow", "failed": "bold red"}


def as_text(diagnosis: Diagnosis) -> str:
    """Return the report without colours."""
    lines = []
    for section, checks in _sections(diagnosis.checks):
        lines += ["", section]
        for check in checks:
            lines.append(f"  {MARKS[check.status]:>6}  {check.name:<20} {check.detail}")
            if check.remedy:
                lines.append(f"{'':30} {check.remedy}")
    return "\n".join([*lines, "", diagnosis.verdict])


def print_rich(diagnosis: Diagnosis) -> None:
    """Print the report in colours; raise ImportError where rich is not installed."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    width = max(len(check.name) for check in diagnosis.checks)
    for section, checks in _sections(diagnosis.checks):
        table = Table.grid(padding=(0, 2))
        table.add_column(width=6, justify="right")
        table.add_column(width=width, no_wrap=True)
        table.add_column(overflow="fold")
        for check in checks:
            colour = COLOURS[check.status]
            detail = escape(check.detail)
            if check.remedy:
                detail += f"\n[bold]{escape(check.remedy)}[/]"
            table.add_row(f"[{colour}]{MARKS[check.status]}[/]", escape(check.name), detail)
        console.print(f"\n[bold]{section}[/]")
        console.print(table)
    colour = "bold green" if diagnosis.ok else "bold red"
    console.print(f"\n[{colour}]{escape(diagnosis.verdict)}[/]")


def _sections(checks: Iterable[Check]) -> Iterator[tuple[str, list[Check]]]:
    by_section: dict[str, list[Check]] = {}
    for check in checks:
        by_section.setdefault(check.section, []).append(check)
    yield from by_section.items()
