"""Draws reports: a panel of bars or of coloured cells for each table with a chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.report import Column, Report, Row, Table

OURS, OTHERS, INK = "#d1495b", "#9aa5b1", "#334155"
TITLE_WIDTH = 100
PALE_INK_FROM = 1.75
"""value above which a cell is so dark that its number is white"""


def draw(reports: Sequence[Report], path: Path) -> None:
    """Write the charts of all reports as one picture; write nothing if there are none."""
    if (figure := picture(reports)) is not None:
        figure.savefig(path, dpi=120)


def picture(reports: Sequence[Report]) -> Figure | None:
    """Return the charts of all reports, one below the other; None if there are none."""
    charts = [
        (report, table)
        for report in reports
        for table in report.tables
        if table.rows and (table.chart or table.heat)
    ]
    if not charts:
        return None
    heights = [1.2 + 0.32 * len(table.rows) for _report, table in charts]
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1)
    figure = Figure(figsize=(10, sum(heights)), layout=layout)
    panels = figure.subplots(len(charts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (report, table) in zip(panels, charts, strict=True):
        (draw_heat if table.heat else draw_bars)(axes, table)
        title = "\n".join(wrap(f"{report.name}: {table.title}", TITLE_WIDTH))
        axes.set_title(title, fontsize=10, loc="left", color=INK)
    return figure


def draw_bars(axes: Axes, table: Table) -> None:
    """Draw one column of a table as bars, with a line from the smallest to the largest value."""
    (column,) = (column for column in table.columns if column.name == table.chart)
    rows = [row for row in table.rows if column.name in row.figures]
    rows.sort(key=lambda row: row.figures[column.name].median, reverse=column.better == "less")
    for y, row in enumerate(rows):
        _bar(axes, y, row, column)
    _name_rows(axes, rows)
    direction = {"less": " (less is better)", "more": " (more is better)"}.get(column.better, "")
    axes.set_xlabel(f"{column.head}{direction}", color=INK)
    axes.margins(x=0.12)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def draw_heat(axes: Axes, table: Table) -> None:
    """Draw columns of a table as cells; the darker, the farther above 1."""
    columns = [column for column in table.columns if column.name in table.heat]
    values = [[row.figures[column.name].median for column in columns] for row in table.rows]
    axes.imshow(values, cmap="YlOrRd", vmin=1.0, vmax=2.2, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            ink = "white" if value > PALE_INK_FROM else INK
            text = f"{value:.{columns[x].digits}f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(columns)), [column.head for column in columns], color=INK)
    _name_rows(axes, table.rows)
    axes.set_xlabel("load/step, ms (1.00 is best)", color=INK)
    axes.tick_params(axis="x", length=0)
    axes.spines[:].set_visible(False)


def _name_rows(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_yticks(range(len(rows)), [row.name for row in rows], color=INK)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.ours else "normal")
    axes.tick_params(axis="y", length=0)


def _bar(axes: Axes, y: int, row: Row, column: Column) -> None:
    spread = row.figures[column.name]
    axes.barh(y, spread.median, color=OURS if row.ours else OTHERS, height=0.7)
    axes.plot([spread.low, spread.high], [y, y], color=INK, linewidth=1)
    axes.annotate(
        f"{spread.median:,.{column.digits}f}",
        (max(spread.high, 0), y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=INK,
    )
