"""Writes ``docs/benchmarks.md``, the figures of `docs/costs.md`, and the chart of the README.

``python -m benchmarks.page`` writes them from the stored reports; they are not edited by hand.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from benchmarks import BENCHMARKS
from benchmarks.costs_page import with_figures
from benchmarks.report import Report, Table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
COSTS = ROOT / "docs" / "costs.md"
CHART = ROOT / "docs" / "benchmarks.png"
INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks --keep` from the reports in `benchmarks/results`, not by hand.
Contenders are measured in turns, in one run. A figure is the median of the rounds, with the
smallest and the largest value in parentheses. Rows of fitloop are bold, also where it loses.
The machines are shared with others: where "a step of the small MLP by hand" is named, it tells how
busy they were. Undisturbed it takes some 100 us.
"""


def stored_reports() -> list[Report]:
    """Return the reports in ``benchmarks/results``."""
    paths = (RESULTS / f"{name}.json" for name in BENCHMARKS)
    return [Report.from_dict(json.loads(path.read_text())) for path in paths if path.exists()]


def write_page() -> None:
    """Write page and figures, then the chart. Raises ImportError without matplotlib."""
    reports = stored_reports()
    PAGE.write_text(page(reports), encoding="utf-8")
    COSTS.write_text(with_figures(COSTS.read_text(encoding="utf-8"), reports), encoding="utf-8")
    from benchmarks.chart import draw  # imported here, as only the chart needs it

    for report in reports:
        if report.name == "overhead":  # the README shows the first table
            draw([replace(report, tables=report.tables[:1])], CHART)


def page(reports: list[Report]) -> str:
    """Return the page as Markdown."""
    return "\n".join([INTRODUCTION, *(section(report) for report in reports)])


def section(report: Report) -> str:
    lines = [f"## {report.name}: {report.question}", "", report.method, ""]
    for table in report.tables:
        lines += [markdown(table), ""]
    points = [f"- {name}: {note}." for name, note in report.notes.items()]
    points += [f"- Not measured: {name}, {reason}." for name, reason in report.skipped.items()]
    machine = ", ".join(f"{key} {value}" for key, value in report.machine.items())
    lines += (
        [*points, "", f"Measured on: {machine}.", ""] if points else [f"Measured on: {machine}."]
    )
    return "\n".join(lines)


def markdown(table: Table) -> str:
    heads = ["", *(column.head for column in table.columns)]
    lines = [f"### {table.title[0].upper()}{table.title[1:]}", ""]
    lines += [f"| {' | '.join(heads)} |", f"|---{'|---:' * len(table.columns)}|"]
    for row in table.rows:
        cells = [f"**{row.name}**" if row.ours else row.name]
        cells += [cell.replace("  ", " ") for cell in table.cells(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *table.remarks])


if __name__ == "__main__":
    write_page()
