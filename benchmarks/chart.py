"""Draws reports: a panel of bars for each table that names a column to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import Column, Report, Row, Table

OURS, OTHERS, INK = "#d1495b", "#9aa5b1", "#334155"


def draw(reports: Sequence[Report], path: Path) -> None:
    """Draw all of their tables into one picture."""
    drawn = [(report, table) for report in reports for table in report.tables if table.chart]
    if not drawn:
        return
    heights = [1.2 + 0.32 * len(table.rows) for _report, table in drawn]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    panels = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (report, table) in zip(panels, drawn, strict=True):
        draw_table(axes, table, f"{report.name} · {table.title}")
    figure.savefig(path, dpi=120)


def draw_table(axes: Axes, table: Table, title: str) -> None:
    """Draw one column of a table as bars, with a line from the least to the most round."""
    (column,) = (column for column in table.columns if column.name == table.chart)
    rows = [row for row in table.rows if column.name in row.figures]
    rows.sort(key=lambda row: row.figures[column.name].median, reverse=column.better == "less")
    for place, row in enumerate(rows):
        _bar(axes, place, row, column)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], color=INK)
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    told = {"less": " (less is better)", "more": " (more is better)"}.get(column.better, "")
    axes.set_xlabel(f"{column.head}{told}", color=INK)
    axes.margins(x=0.12)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _bar(axes: Axes, place: int, row: Row, column: Column) -> None:
    spread = row.figures[column.name]
    axes.barh(place, spread.median, color=OURS if row.ours else OTHERS, height=0.7)
    axes.plot([spread.low, spread.high], [place, place], color=INK, linewidth=1)
    axes.annotate(
        f"{spread.median:,.{column.digits}f}",
        (max(spread.high, 0), place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=INK,
    )
