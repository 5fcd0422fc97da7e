"""Writes the figures of `docs/costs.md` from the stored reports: one line for each question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report import Report, Row, Table

BEGIN = "<!-- figures: made by python -m benchmarks.page -->"
END = "<!-- end of figures -->"


@dataclass(frozen=True, kw_only=True)
class Line:
    """Figures of fitloop, and those of other contenders."""

    question: str
    report: str
    table: int
    column: str
    ours: Sequence[str]
    """rows of fitloop; several are shown with their names"""
    others: Sequence[str]
    """rows of other contenders"""


def overhead(question: str, table: int, *others: str, column: str = "added") -> Line:
    return Line(
        question=question,
        report="overhead",
        table=table,
        column=column,
        ours=["fitloop"],
        others=others,
    )


def close(question: str, table: int) -> Line:
    return Line(
        question=question,
        report="overhead",
        table=table,
        column="added",
        ours=["fitloop", "fitloop, seeded"],
        others=[],
    )


def overlap(question: str, table: int) -> Line:
    return Line(
        question=question,
        report="overlap",
        table=table,
        column="all cells",
        ours=["fitloop"],
        others=["bare loop", AHEAD, "bare loop, 1 worker", "bare loop, 2 workers", "Lightning"],
    )


def at_once(question: str, *ours: str) -> Line:
    return Line(
        question=question, report="concurrency", table=0, column="speed-up", ours=ours, others=[]
    )


AHEAD = "bare loop, a thread reads ahead"
LIGHTNING = ("Lightning Fabric", "Lightning")
LINES = [
    close("in turns with a bare loop in one process: added to a batch of a small MLP", 4),
    close("the same, without loss and accuracy", 5),
    close("the same, steps that compute nothing", 8),
    overhead("whole programs, each in a process: added to a batch of a small MLP", 0, *LIGHTNING),
    overhead("the same, without loss and accuracy", 1, *LIGHTNING),
    overhead(
        "a batch of a CNN, loss and accuracy kept, divided by the bare loop's",
        2,
        *LIGHTNING,
        column="ratio",
    ),
    overlap("a loader that waits: time divided by the longer of load and step (best: 1)", 0),
    overlap("a loader that decompresses", 1),
    overlap("a loader that computes in Python", 2),
    Line(
        question="delay of the event loop while the MLP trains, 99th percentile",
        report="responsiveness",
        table=0,
        column="p99",
        ours=["fitloop"],
        others=["idle loop", "by hand, run_in_executor a batch", "straight on the loop"],
    ),
    at_once("two CNNs at once, against one after the other", "two CNNs", "two CNNs, in processes"),
    at_once("eight trainers whose loaders wait 20 ms", "eight, loaders wait 20 ms"),
    at_once("two small models", "two small", "two small, in processes"),
    Line(
        question="a request to the web service while two small models train, 99th percentile",
        report="service_latency",
        table=0,
        column="p99",
        ours=["threads, small", "processes, small"],
        others=["idle, before small"],
    ),
]


def figures(reports: Sequence[Report]) -> str:
    """Return the block of the page, from `BEGIN` to `END`."""
    by_name = {report.name: report for report in reports}
    lines = [BEGIN, "| | fitloop | compared with |", "|---|---|---|"]
    for line in LINES:
        if line.report not in by_name:
            continue
        table = by_name[line.report].tables[line.table]
        ours = "; ".join(_text(table, name, line, named=len(line.ours) > 1) for name in line.ours)
        others = "; ".join(_text(table, name, line, named=True) for name in line.others)
        lines.append(f"| {line.question} | {ours} | {others} |")
    return "\n".join([*lines, END])


def with_figures(costs: str, reports: Sequence[Report]) -> str:
    """Return the page with a new block."""
    before, _, block_on = costs.partition(BEGIN)
    _block, _, after = block_on.partition(END)
    return before + figures(reports) + after


def _text(table: Table, name: str, line: Line, *, named: bool) -> str:
    row: Row = next(row for row in table.rows if row.name == name)
    column = next(column for column in table.columns if column.name == line.column)
    unit = column.unit.split()[0] if column.unit else "x"
    figure = f"{row.figures[column.name].median:,.{column.digits}f} {unit}"
    if name in line.ours:
        figure = f"**{figure}**"
    return f"{name} {figure}" if named else figure
